"""Ways in which vLLM servers get the weights of a policy in training.

The version of the weights is the number of optimizer steps that were made. `VLLMRollouts.refresh`
updates the servers in this order, on all ranks:

1. `WeightTransfer.prepare`, while the servers still answer requests,
2. every server is paused,
3. `WeightTransfer.update_weights`,
4. every prefix cache is emptied, and every server resumed.

`reload_lost_server` is for a server that is restarted while a rank waits for its answers: that rank
pauses it, calls this, empties its prefix cache and resumes it.
"""

from pathlib import Path
from typing import Protocol

from alignment.engines.protocol import AlignmentEngine
from alignment.rl.vllm_servers import VLLMServer, VLLMServers


class WeightTransfer(Protocol):
    """Way in which servers get weights."""

    def prepare(self, version: int) -> None:
        """Make a version of the weights ready while servers still answer; a collective.

        Args:
            version: The present version of the engine's weights.
        """

    def update_weights(self, version: int, servers: VLLMServers) -> None:
        """Let all servers, which are paused, load a prepared version; a collective.

        `VLLMServers.call` makes the calls from rank 0.

        Args:
            version: The version.
            servers: The servers.

        Raises:
            UserError: A server refuses or does not answer, on all ranks.
        """

    async def reload_lost_server(self, version: int, server: VLLMServer) -> None:
        """Let one paused server, which was restarted, load the version; no collective.

        Args:
            version: The version that the servers were last updated to.
            server: The server.

        Raises:
            UserError: The server refuses or does not answer, or this transfer requires all ranks.
        """


class FolderTransfer:
    """Transfer by Hugging Face folders on a file system that the servers can read."""

    def __init__(self, engine: AlignmentEngine, folder: Path) -> None:
        """Make a transfer.

        Args:
            engine: Engine whose weights are served.
            folder: Folder to write.
        """
        self.engine, self.folder = engine, folder.absolute()

    def prepare(self, version: int) -> None:
        """Write the folder; see `WeightTransfer.prepare`."""
        self.engine.export(self.folder)

    def update_weights(self, version: int, servers: VLLMServers) -> None:
        """Let the servers read the folder; see `WeightTransfer.update_weights`."""
        servers.call(lambda server: self.reload_lost_server(version, server))

    async def reload_lost_server(self, version: int, server: VLLMServer) -> None:
        """Let one server read the folder; see `WeightTransfer.reload_lost_server`."""
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(self.folder)}}
        await server.while_healthy(server.post("/collective_rpc", body))
