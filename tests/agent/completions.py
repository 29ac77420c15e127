"""A local server of vLLM's completions protocol, as far as it is asked for here: a tiny model with
adapters that are loaded and unloaded while it runs. Token by token, each with a whole forward pass
of transformers: nothing of how the trainer samples."""

import copy
import json
import threading
from http import HTTPStatus

import torch
from endpoint import Endpoint, _send
from peft import PeftModel
from transformers import AutoModelForCausalLM


class CompletionsServer(Endpoint):
    """Serves the model of a folder under a name.

    ``faults``: answers of the next requests for completions, instead of the right ones.
    ``edit`` changes an answer before it is sent. ``calls``: paths and bodies in their order.
    """

    def __init__(self, folder, name="base"):
        self.name = name
        self.base = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.adapters = {}
        self.faults = []
        self.calls = []
        self.edit = lambda body: body
        self.runtime_loading = True
        self.processed_log_probs = False
        self._computing = threading.Lock()
        super().__init__()
        self.default = self._respond

    def get(self, handler):
        names = [self.name, *self.adapters]
        self._json(handler, {"object": "list", "data": [{"id": name} for name in names]})

    def _json(self, handler, data, status=HTTPStatus.OK):
        _send(handler, status, json.dumps(data).encode())

    def _error(self, handler, status, message):
        self._json(handler, {"error": {"message": message, "code": int(status)}}, status)

    def _respond(self, handler, body):
        path = handler.path.removeprefix("/v1")
        self.calls.append((path, body))
        if path == "/completions":
            if self.faults:
                return self.faults.pop(0)(handler, body)
            return self._complete(handler, body)
        if not self.runtime_loading:
            return self._json(handler, {"detail": "Not Found"}, HTTPStatus.NOT_FOUND)
        if path == "/load_lora_adapter":
            if body["lora_name"] in self.adapters:
                return self._error(handler, 400, "The lora adapter has already been loaded.")
            base = copy.deepcopy(self.base)
            loaded = PeftModel.from_pretrained(base, body["lora_path"]).eval()
            self.adapters[body["lora_name"]] = loaded
        elif self.adapters.pop(body["lora_name"], None) is None:
            return self._error(handler, 404, "The lora adapter cannot be found.")
        return _send(handler, 200, b"Success")

    def _complete(self, handler, body):
        model = {self.name: self.base, **self.adapters}.get(body["model"])
        if model is None:
            return self._error(handler, 404, f"The model `{body['model']}` does not exist.")
        if body["temperature"] == 0 and body["n"] > 1:
            return self._error(handler, 400, "n must be 1 when using greedy sampling.")
        with self._computing, torch.no_grad():
            choices = [self._choice(model, body, i) for i in range(body["n"])]
        self._json(handler, self.edit({"object": "text_completion", "choices": choices}))

    def _choice(self, model, body, index):
        generator = torch.Generator().manual_seed(body["seed"] + index)
        ids, values = [], []
        while len(ids) < body["max_tokens"]:
            logits = model(torch.tensor([[*body["prompt"], *ids]])).logits[0, -1].float()
            if body["temperature"] == 0:
                token = int(logits.argmax())
            else:
                probs = (logits / body["temperature"]).softmax(0)
                token = int(torch.multinomial(probs, 1, generator=generator))
            ids.append(token)
            if self.processed_log_probs:
                logits = logits / (body["temperature"] or 1.0)
            values.append(float(logits.log_softmax(0)[token]))
            if token in body["stop_token_ids"]:
                break
        stopped = ids[-1] in body["stop_token_ids"]
        return {
            "index": index,
            "text": "",
            "finish_reason": "stop" if stopped else "length",
            "stop_reason": ids[-1] if stopped else None,
            "logprobs": {
                "tokens": [f"token_id:{token}" for token in ids],
                "token_logprobs": values,
                "top_logprobs": [{f"token_id:{t}": v} for t, v in zip(ids, values, strict=True)],
                "text_offset": [0] * len(ids),
            },
            "token_ids": ids,
            "prompt_token_ids": body["prompt"],
        }
