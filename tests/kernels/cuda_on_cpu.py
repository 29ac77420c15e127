"""The CUDA kernels compiled by g++ and run on the CPU, as tests/cuda_on_cpu/emulator.h does it.

Every kernel of csrc/cuda is taken as it is; only `kernel<<<...>>>(...)`, which is not C++, is
rewritten.
"""

import ctypes
import re
import subprocess
from ctypes import POINTER, Structure, c_char_p, c_double, c_float, c_int, c_int64, c_void_p
from pathlib import Path

import torch

from regrpo_kernels._library import DTYPE_CODES, pointer, rows
from regrpo_kernels.grpo_loss import STATS
from regrpo_kernels.objective import KL_ESTIMATORS, POLICIES

ROOT = Path(__file__).parents[2]
HEADERS = ROOT / "tests" / "cuda_on_cpu"


class Rows(Structure):
    _fields_ = [("data", c_void_p), *((name, c_int64) for name in ("inner", "outer", "row"))]


class TokenLogProbsArgs(Structure):
    _fields_ = [
        ("dtype", c_int),
        ("logits", Rows),
        ("rows", c_int64),
        ("vocab", c_int64),
        ("labels", c_void_p),
        ("temperature", c_double),
        ("softcap", c_double),
        ("log_probs", c_void_p),
        ("lse", c_void_p),
        ("entropy", c_void_p),
        ("reference", c_void_p),
        ("sum", c_void_p),
        ("dlogits", Rows),
        ("dlog_probs", c_void_p),
        ("dentropy", c_void_p),
        ("bad_row", c_int64),
    ]


class ObjectiveParams(Structure):
    _fields_ = [
        ("policy", c_int),
        ("kl_estimator", c_int),
        ("epsilon_low", c_float),
        ("epsilon_high", c_float),
        ("delta", c_float),
        ("beta", c_float),
        ("entropy_coef", c_float),
        ("sapo_tau_pos", c_float),
        ("sapo_tau_neg", c_float),
    ]


class GrpoLossArgs(Structure):
    _fields_ = [
        ("dtype", c_int),
        ("logits", Rows),
        ("rows", c_int64),
        ("vocab", c_int64),
        ("labels", c_void_p),
        ("mask", c_void_p),
        ("weights", c_void_p),
        ("advantages", c_void_p),
        ("old_log_probs", c_void_p),
        ("ref_log_probs", c_void_p),
        ("temperature", c_double),
        ("softcap", c_double),
        ("objective", ObjectiveParams),
        ("stats", c_void_p),
        ("dlogits", Rows),
        ("bad_row", c_int64),
    ]


class SequenceObjectiveArgs(Structure):
    _fields_ = [
        ("tokens", c_int64),
        ("sequences", c_int64),
        ("cu_seqlens", c_void_p),
        ("mask", c_void_p),
        ("weights", c_void_p),
        ("advantages", c_void_p),
        ("old_log_probs", c_void_p),
        ("ref_log_probs", c_void_p),
        ("objective", ObjectiveParams),
        ("stats", c_void_p),
    ]


class AdvantageRule(Structure):
    _fields_ = [
        *((name, c_int) for name in ("baseline", "scale", "ddof")),
        *((name, c_double) for name in ("eps", "min_std", "clip")),
    ]


class GroupAdvantagesArgs(Structure):
    _fields_ = [
        ("sequences", c_int64),
        ("rewards", c_void_p),
        ("group_ids", c_void_p),
        ("group_size", c_int64),
        ("rule", AdvantageRule),
        ("advantages", c_void_p),
    ]


class ReflectionAdvantagesArgs(Structure):
    _fields_ = [
        ("tokens", c_int64),
        ("success", c_void_p),
        ("verifier_scores", c_void_p),
        ("segment_ids", c_void_p),
        ("segment_id_bytes", c_int),
        ("cu_seqlens", c_void_p),
        *((name, c_double) for name in ("lambda_exec", "eta", "tokens_per_cost", "lambda_val")),
        ("reflection_tokens", c_void_p),
        ("rewards", c_void_p),
        ("group", GroupAdvantagesArgs),
        ("token_advantages", c_void_p),
        ("loss_mask", c_void_p),
    ]


OPS = {
    "token_log_probs": TokenLogProbsArgs,
    "token_log_probs_backward": TokenLogProbsArgs,
    "grpo_loss": GrpoLossArgs,
    "sequence_objective": SequenceObjectiveArgs,
    "group_advantages": GroupAdvantagesArgs,
    "reflection_advantages": ReflectionAdvantagesArgs,
}


def build(compiler: str, directory: Path) -> ctypes.CDLL:
    """Compiles the kernels into `directory` (about 10 s) and loads them."""
    sources = [HEADERS / "exports.cpp", HEADERS / "faults.cpp"]
    for kernel in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        text = re.sub(
            r"([\w:]+(?:<\w+>)?)\s*<<<(.*?)>>>\s*\(",
            r"emulator::configure(\1, \2)(",
            kernel.read_text(),
            flags=re.DOTALL,
        )
        sources.append(directory / f"{kernel.stem}.cpp")
        sources[-1].write_text(f'#line 1 "{kernel}"\n{text}')
    library = directory / "cuda_on_cpu.so"
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", f"-I{HEADERS}", f"-I{ROOT / 'csrc'}"]
    command = [compiler, *flags, '-DREGRPO_CUDA_ARCHITECTURES="cpu"', *map(str, sources)]
    done = subprocess.run(
        [*command, "-o", str(library)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the CUDA kernels do not compile on the CPU:\n{done.stderr}")
    loaded = ctypes.CDLL(str(library))
    loaded.last_error.restype = c_char_p
    loaded.run_fault.argtypes = [c_char_p, c_void_p, c_void_p]
    loaded.size_of.restype = loaded.last_grid.restype = loaded.launch_count.restype = c_int64
    loaded.set_order.argtypes = [ctypes.c_bool, ctypes.c_bool]
    for name, arguments in OPS.items():
        getattr(loaded, name).argtypes = [POINTER(arguments)]
        assert loaded.size_of(arguments.__name__.encode()) == ctypes.sizeof(arguments), name
    return loaded


def objective_params(policy="clip", kl_estimator="k3", **options) -> ObjectiveParams:
    defaults = {
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "delta": 0.0,
        "beta": 0.0,
        "entropy_coef": 0.0,
        "sapo_tau_pos": 1.0,
        "sapo_tau_neg": 1.05,
    }
    return ObjectiveParams(
        policy=POLICIES.index(policy),
        kl_estimator=KL_ESTIMATORS.index(kl_estimator),
        **{name: options.get(name, value) for name, value in defaults.items()},
    )


class Emulator:
    """The kernels, on an emulated device."""

    def __init__(self, compiler: str, directory: Path) -> None:
        self.library = build(compiler, directory)
        self._devices: dict[tuple[int, int, int], int] = {}

    def use(self, capability: int, per_block: int, per_multiprocessor: int) -> None:
        """A device of this compute capability (90 is 9.0) and shared memory, in bytes."""
        key = (capability, per_block, per_multiprocessor)
        if key not in self._devices:
            self._devices[key] = self.library.add_device(*key)
        self.library.set_device(self._devices[key])

    def call(self, op, arguments) -> None:
        status = getattr(self.library, op)(ctypes.byref(arguments))
        assert status == 0, f"{op}: status {status}, {self.library.last_error().decode()}"

    def token_log_probs(
        self, logits, labels, temperature=1.0, softcap=None, entropy=True, row_sums=None
    ):
        """`(log_probs, lse, entropy | None)`; `row_sums` [2, T] are filled for backward."""
        row_sums = torch.empty(2, *labels.shape) if row_sums is None else row_sums
        out = [torch.full(labels.shape, torch.nan) for _ in range(3 if entropy else 2)]
        arguments = TokenLogProbsArgs(
            dtype=DTYPE_CODES[logits.dtype],
            logits=Rows(*rows(logits)),
            rows=labels.numel(),
            vocab=logits.shape[-1],
            labels=pointer(labels),
            temperature=temperature,
            softcap=softcap or 0.0,
            log_probs=pointer(out[0]),
            lse=pointer(out[1]),
            entropy=pointer(out[2]) if entropy else 0,
            reference=pointer(row_sums[0]),
            sum=pointer(row_sums[1]),
        )
        self.call("token_log_probs", arguments)
        return (*out, None)[:3]

    def token_log_probs_backward(
        self, logits, labels, dlogits, row_sums, dlog_probs, entropy=None, dentropy=None, **scaling
    ):
        arguments = TokenLogProbsArgs(
            dtype=DTYPE_CODES[logits.dtype],
            logits=Rows(*rows(logits)),
            rows=labels.numel(),
            vocab=logits.shape[-1],
            labels=pointer(labels),
            temperature=scaling.get("temperature", 1.0),
            softcap=scaling.get("softcap") or 0.0,
            entropy=pointer(entropy),
            reference=pointer(row_sums[0]),
            sum=pointer(row_sums[1]),
            dlogits=Rows(*rows(dlogits)),
            dlog_probs=pointer(dlog_probs),
            dentropy=pointer(dentropy),
        )
        self.call("token_log_probs_backward", arguments)

    def grpo_loss(
        self, logits, dlogits, labels, mask, weights, advantages, old=None, ref=None, **o
    ):
        """`{name: statistic}`; the gradient goes to `dlogits`, which may be the logits or None."""
        stats = torch.full((len(STATS), *labels.shape), torch.nan)
        arguments = GrpoLossArgs(
            dtype=DTYPE_CODES[logits.dtype],
            logits=Rows(*rows(logits)),
            rows=labels.numel(),
            vocab=logits.shape[-1],
            labels=pointer(labels),
            mask=pointer(mask),
            weights=pointer(weights),
            advantages=pointer(advantages),
            old_log_probs=pointer(old),
            ref_log_probs=pointer(ref),
            temperature=o.get("temperature", 1.0),
            softcap=o.get("softcap") or 0.0,
            objective=objective_params(**o),
            stats=pointer(stats),
            dlogits=Rows() if dlogits is None else Rows(*rows(dlogits)),
        )
        self.call("grpo_loss", arguments)
        return dict(zip(STATS, stats, strict=True))
