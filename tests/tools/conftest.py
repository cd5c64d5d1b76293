from tests.data.tokenizer_fixtures import model as model
from tests.data.tokenizer_fixtures import tokenizer as tokenizer
