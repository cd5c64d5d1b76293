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

import os
import shutil
from pathlib import Path
from typing import Protocol

import torch.distributed as dist

from alignment.engines.protocol import AlignmentEngine
from alignment.ranks import on_first_rank
from alignment.rl.vllm_servers import ServerRefused, VLLMServer, VLLMServers
from megatron_ext.errors import UserError
from megatron_ext.hf.families import OWN
from megatron_ext.model_location import read_json_object


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
    """Transfer by Hugging Face folders on a file system that the servers can read.

    Every version has a separate folder, ROOT/v000012. The link ROOT/latest names the newest, from
    which servers can be started. The one before it stays, because a server may be reading it.
    """

    def __init__(self, engine: AlignmentEngine, root: Path) -> None:
        """Make a transfer.

        Args:
            engine: Engine whose weights are served.
            root: Folder of all versions.
        """
        self.engine, self.root = engine, root.absolute()

    def prepare(self, version: int) -> None:
        """Write the folder of a version; see `WeightTransfer.prepare`.

        Raises:
            UserError: It cannot be written, on all ranks.
        """
        # vLLM on CPUs does not load a tied output layer again. It does so with an untied one.
        untie_head = dist.get_backend() != "nccl"
        self.engine.export(self._folder(version), untie_head=untie_head)
        on_first_rank(lambda: self._make_latest(version))

    def update_weights(self, version: int, servers: VLLMServers) -> None:
        """Let the servers read a version; see `WeightTransfer.update_weights`."""
        servers.call(lambda server: self.reload_lost_server(version, server))

    async def reload_lost_server(self, version: int, server: VLLMServer) -> None:
        """Let one server read a version; see `WeightTransfer.reload_lost_server`."""
        await self._refuse_stale_head(server)
        folder = str(self._folder(version))
        body = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
        call = server.post("/collective_rpc", body)
        await server.while_healthy(call, lambda: f"loads {folder}")

    async def _refuse_stale_head(self, server: VLLMServer) -> None:
        """Refuse a server on a CPU that would answer from the output layer that it started with.

        Raises:
            UserError: The output layer is tied to the embeddings, or that cannot be read.
        """
        try:
            call = server.get("/server_info?config_format=json")
            config = (await server.while_healthy(call))["vllm_config"]
            device, settings = config["device_config"]["device"], config["model_config"]
            model, remote_code = settings["model"], settings["trust_remote_code"]
        except (ServerRefused, KeyError, TypeError):
            return  # a version of vLLM without this route
        if not device.startswith("cpu"):
            return
        latest = self.root / "latest"
        served, written = (read_json_object(Path(f) / "config.json") for f in (model, latest))
        if served.get("model_type") == OWN.name and not remote_code:
            return  # the plug-in has a separate output layer
        if served.get("tie_word_embeddings") != written.get("tie_word_embeddings"):
            raise UserError(
                f"{server.url} serves {model} on a CPU, where vLLM loads an output layer that is "
                "tied to the embeddings only once, and its config.json does not state that it is "
                f"untied. Start the server from {latest}, or use --weight-transfer gloo."
            )

    def _folder(self, version: int) -> Path:
        return self.root / f"v{version:06d}"

    def _make_latest(self, version: int) -> None:
        """Let the link name a version, and remove the versions before the one that it named."""
        link, new = self.root / "latest", self.root / ".latest.tmp"
        try:
            previous = os.readlink(link) if link.is_symlink() else ""
            new.unlink(missing_ok=True)
            new.symlink_to(self._folder(version).name)
            os.replace(new, link)
        except OSError as error:
            raise UserError(f"{link} cannot be written: {error}") from error
        for folder in self.root.glob("v[0-9]*"):
            if folder.name not in (previous, self._folder(version).name):
                shutil.rmtree(folder, ignore_errors=True)
