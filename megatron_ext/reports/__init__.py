"""Reports of pretraining runs, as pictures, HTML pages and Markdown."""
