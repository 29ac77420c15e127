"""The learner's LoRA adapter on a vLLM server, and the policy that samples from it there.

An adapter is served under a name made of its content: vLLM takes the keys of a prefix that it has
computed for those of any adapter of the same name, so one name for all updates would sample from a
mixture of them. The former adapter is unloaded when the next one is there.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import httpx
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from regrpo.config import RolloutConfig
from regrpo.endpoint import Endpoint
from regrpo.errors import RunError
from regrpo.modeling import CausalLM, head
from regrpo.server_policy import ServerPolicy

WEIGHTS = "adapter_model.safetensors"
_ENABLE = (
    "; expected a vLLM server started with --enable-lora, --max-lora-rank at least lora.rank and "
    "the environment variable VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, which sees that folder"
)


class ServedAdapter:
    """Saves an adapter and has it loaded by a server.

    Args:
        url: of the server, with its /v1.
        folder: for adapters; the server must see it under the same path.

    Attributes:
        name: of the adapter that the server has loaded last; None before.
    """

    def __init__(self, endpoint: Endpoint, url: str, model: PeftModel, folder: Path) -> None:
        self._endpoint = endpoint
        self._url = url
        self._model = model
        self._folder = folder.resolve()
        self.name: str | None = None

    def _save(self) -> Path:
        """The adapter as it is now, in a folder of its name, which appears whole or not at all."""
        partial = self._folder / ".partial"
        shutil.rmtree(partial, ignore_errors=True)
        self._model.save_pretrained(str(partial))
        digest = hashlib.sha256((partial / WEIGHTS).read_bytes()).hexdigest()[:16]
        final = self._folder / f"regrpo-{digest}"
        if final.exists():  # the same weights, whole
            shutil.rmtree(partial)
        else:
            os.replace(partial, final)
        return final

    async def load(self, client: httpx.AsyncClient, served: list[str]) -> None:
        """Has the server serve what the learner is now.

        Args:
            served: names that the server has already.

        Raises:
            RunError: it does not take it.
        """
        path, former = self._save(), self.name
        if path.name not in served:
            await self._post(client, "load", {"lora_name": path.name, "lora_path": str(path)})
        self.name = path.name
        if former is not None and former != path.name:
            await self._post(client, "unload", {"lora_name": former})
            shutil.rmtree(self._folder / former)

    async def _post(self, client: httpx.AsyncClient, what: str, fields: dict[str, str]) -> None:
        url, body = f"{self._url}/{what}_lora_adapter", json.dumps(fields).encode()
        response = await self._endpoint.repeat(
            lambda: self._endpoint.post(client, url, body), f"{what}-{fields['lora_name']}"
        )
        if what == "unload" and response.status_code == 404:
            return  # the server was started again since
        if response.status_code != 200:
            said = self._endpoint.status(response)
            where = fields.get("lora_path", fields["lora_name"])
            raise self._endpoint.stop(f"cannot {what} the adapter {where}: {said}{_ENABLE}")


class ServedLearner(ServerPolicy):
    """Samples from the learner's adapter, see `regrpo.rollout.LearningPolicy`.

    Args:
        model: the learner, an adapter on the model that is served.
        out: folder of the run.
        temperature, max_new_tokens: see ``ServerPolicy``.

    Raises:
        RunError: the model is no adapter; or see ``ServerPolicy``.
    """

    what_next = ServerPolicy.what_next + ": the run goes on from its last checkpoint"

    def __init__(
        self,
        config: RolloutConfig,
        model: CausalLM,
        tokenizer: PreTrainedTokenizerBase,
        out: str | Path,
        *,
        temperature: float = 1.0,
        max_new_tokens: int = 128,
    ):
        if not isinstance(model, PeftModel):
            raise RunError(
                "rollout.backend is server and lora.rank is 0: an OpenAI-compatible server can "
                "take a new adapter, not new weights; expected lora.rank above 0, or "
                "rollout.backend=local"
            )
        super().__init__(
            config,
            tokenizer,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            vocab=len(head(model)[0]),
        )
        self.model: CausalLM = model
        folder = Path(out) / "adapters" if config.adapter_dir is None else Path(config.adapter_dir)
        self._adapter = ServedAdapter(self._endpoint, self._url, model, folder)

    def renew(self, seed: int) -> None:
        """What is sampled from here on is that of the learner now, and of the seed."""
        self._seed, self._sessions = seed, 0

        async def load(client: httpx.AsyncClient) -> None:
            await self._adapter.load(client, await self._served(client))

        self._run(load)
        self.served_name = self._adapter.name
