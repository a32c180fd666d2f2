"""The CPU backend: what it answers, what it leaves alone, and that CUDA turns it off.

Each case runs in a process of its own, since patches stay for a process's life.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

_ROOT = Path(__file__).resolve().parents[2]
_SNAPSHOT = """
import json, sys, torch, torch.cuda.random, torch.cuda.nvtx, megatron.core
from megatron.core.tensor_parallel import random as megatron_random
from megatron_cgn.parallel import cpu

PLACES = [torch, torch.cuda, torch.cuda.random, torch.cuda.nvtx, torch.Tensor, torch.nn.Module,
          torch.nn.functional, torch.random, torch.compiler, torch.autograd, torch.distributed,
          megatron_random]

def snapshot():
    # Objects themselves, so that a replaced one cannot come back under the same id.
    return {(p.__name__, n): v for p in PLACES for n, v in vars(p).items()}

def replaced(before):
    after = snapshot()
    names = {*before, *after}
    return sorted(".".join(n) for n in names if before.get(n) is not after.get(n))
"""


def _python(code: str) -> Any:
    """Run code in a fresh interpreter; what it prints last, as JSON."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _SNAPSHOT + code],
        capture_output=True,
        text=True,
        cwd=_ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_where_cuda_is_there_nothing_at_all_is_replaced() -> None:
    result = _python("""
stance = torch.compiler.get_default_backend
torch.cuda.is_available = lambda: True
filters = list(__import__("logging").getLogger(megatron_random.__name__).filters)
before = snapshot()
answers = [cpu.install(), cpu.install(), cpu.is_installed()]
modes = torch.overrides._get_current_function_mode_stack()
after = list(__import__("logging").getLogger(megatron_random.__name__).filters)
compiled = torch._dynamo.eval_frame._stance.stance
print(json.dumps([answers, replaced(before), len(modes), filters == after, compiled,
                  cpu.backend(), len(before)]))
""")
    answers, changed, modes, same_filters, stance, backend, looked_at = result
    assert answers == [False, False, False]
    assert changed == []
    assert looked_at > 2000
    assert modes == 0
    assert same_filters
    assert stance == "default"
    assert backend == "nccl"


@pytest.fixture(scope="module")
def installed() -> dict[str, Any]:
    """Everything that is asked of one process without CUDA, after installing."""
    answer: dict[str, Any] = _python("""
from megatron.core import tensor_parallel
import tempfile
before = snapshot()
plain_type = torch.zeros(1).type()
out = {"first": cpu.install(), "installed": cpu.is_installed()}
changed = replaced(before)
again = snapshot()
out["second"] = cpu.install()
out["changed_again"] = replaced(again)
out["changed"] = changed
out["available"] = torch.cuda.is_available()
out["backend"] = cpu.backend()
out["device"] = str(cpu.device())
cuda = torch.device("cuda")
made = {
    "zeros": torch.zeros(2, device="cuda"),
    "empty": torch.empty(2, device="cuda:0"),
    "arange": torch.arange(3, device=cuda),
    "tensor": torch.tensor([1.5], device="cuda", pin_memory=True),
    "like": torch.zeros_like(torch.ones(2, 2), device=torch.cuda.current_device()),
    "to": torch.ones(2).to("cuda"),
    "to_keyword": torch.ones(2).to(device="cuda", dtype=torch.float64),
    "cuda": torch.ones(2).cuda(),
    "module": torch.nn.Linear(2, 2).cuda().weight,
}
out["devices"] = {n: t.device.type for n, t in made.items()}
out["to_dtype"] = str(made["to_keyword"].dtype)
out["meta"] = [
    torch.zeros(2, device="meta").device.type,
    torch.ones(2).to("meta").device.type,
]
with torch.device("meta"):
    out["meta_context"] = [torch.empty(2).device.type, torch.arange(3).device.type,
                           torch.nn.Linear(2, 2).weight.device.type]
out["types"] = [torch.zeros(1).type(), torch.zeros(1, dtype=torch.bfloat16).type(),
                str(torch.zeros(1).type(torch.float64).dtype)]
torch.manual_seed(3)
state = torch.cuda.get_rng_state()
first = torch.rand(4)
torch.cuda.set_rng_state(state)
out["rng"] = torch.equal(first, torch.rand(4))
torch.cuda.manual_seed(5); a = torch.rand(2)
torch.manual_seed(5); b = torch.rand(2)
out["seed"] = torch.equal(a, b)
stream = torch.cuda.Stream()
event = stream.record_event()
with torch.cuda.stream(stream):
    torch.cuda.current_stream().wait_stream(stream); event.wait(); event.synchronize()
out["events"] = [event.query(), stream.query()]
from transformers import AutoModelForCausalLM
from megatron_cgn.testing import tiny_hf_model
with tempfile.TemporaryDirectory() as root:
    path = tiny_hf_model(root, "llama")
    for _ in range(3):  # memory handed out again holds other values
        junk = [torch.full((n,), 7.7) for n in (8, 16, 32, 64)]
        del junk
        model = AutoModelForCausalLM.from_pretrained(path)
    frequencies = model.model.rotary_emb.inv_freq.tolist()
out["frequencies"] = frequencies
print(json.dumps(out))
""")
    return answer


def test_installing_is_idempotent_and_tells_the_truth(installed: dict[str, Any]) -> None:
    assert installed["first"] and installed["second"] and installed["installed"]
    assert installed["changed_again"] == []
    assert installed["available"] is False
    assert (installed["backend"], installed["device"]) == ("gloo", "cpu")


def test_what_is_replaced_is_only_what_is_announced(installed: dict[str, Any]) -> None:
    from megatron_cgn.parallel import cpu

    allowed = {f"torch.{name}" for name in cpu._FACTORIES}
    allowed |= {f"Tensor.{n}" for n in ("to", "type", "cuda", "record_stream")} | {"Module.cuda"}
    rest = [
        name
        for name in installed["changed"]
        if name not in allowed
        and not name.startswith(("torch.cuda.", "torch.cuda.random.", "torch.cuda.nvtx."))
        and name != "megatron.core.tensor_parallel.random._set_cuda_rng_state"
    ]
    assert rest == []
    assert "torch.cuda.is_available" not in installed["changed"]


def test_every_way_of_asking_for_cuda_gives_the_cpu(installed: dict[str, Any]) -> None:
    assert set(installed["devices"].values()) == {"cpu"}
    assert installed["to_dtype"] == "torch.float64"


def test_other_devices_are_still_themselves(installed: dict[str, Any]) -> None:
    assert installed["meta"] == ["meta", "meta"]
    assert installed["meta_context"] == ["meta", "meta", "meta"]


def test_type_names_are_those_megatron_compares(installed: dict[str, Any]) -> None:
    assert installed["types"] == [
        "torch.cuda.FloatTensor",
        "torch.cuda.BFloat16Tensor",
        "torch.float64",
    ]


def test_random_state_of_cuda_is_that_of_the_cpu(installed: dict[str, Any]) -> None:
    assert installed["rng"] and installed["seed"]
    assert installed["events"] == [True, True]


def test_transformers_still_loads_models_whole(installed: dict[str, Any]) -> None:
    # Its RoPE frequencies are made on the meta device and filled afterwards.
    expected = [10000.0 ** (-2 * i / 16) for i in range(8)]
    assert installed["frequencies"] == pytest.approx(expected, rel=1e-6)


def test_allocator_is_set_but_for_what_the_user_has_set() -> None:
    result = _python("""
import ctypes, os
class Library:
    def __init__(self, name): pass
    def mallopt(self, parameter, value): calls.append(parameter)
ctypes.CDLL = Library
names = ["MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES"]
answers = []
for theirs in ({}, {"MALLOC_MMAP_THRESHOLD_": "4294967296"}, dict.fromkeys(names[:3], "1"),
               {"GLIBC_TUNABLES": "glibc.malloc.top_pad=1:glibc.malloc.check=0"}):
    for name in names:
        os.environ.pop(name, None)
    os.environ.update(theirs)
    calls = []
    cpu._keep_freed_memory()
    answers.append(sorted(calls))
print(json.dumps(answers))
""")
    mmap_threshold, top_pad, trim_threshold = -3, -2, -1  # as in glibc's malloc.h
    everything = [mmap_threshold, top_pad, trim_threshold]
    assert result == [everything, [top_pad, trim_threshold], [], [mmap_threshold, trim_threshold]]


def test_gradients_are_clipped_in_place() -> None:
    result = _python("""
from torch.utils._python_dispatch import TorchDispatchMode
from megatron.core.optimizer import clip_grads, optimizer
cpu.install()
made = []
class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = {a.data_ptr() for a in (*args, *(kwargs or {}).values())
                 if isinstance(a, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.data_ptr() not in known:
            made.append(str(function))
        return result
weight = torch.nn.Parameter(torch.zeros(3))
weight.grad = torch.tensor([3.0, 0.0, 4.0])
buffer = weight.grad
with Watch():
    clip_grads.clip_grad_by_total_norm_fp32([weight], max_norm=1.0, total_norm=5.0)
fp32, bf16 = torch.tensor([1.0 + 2.0**-9 + 2.0**-20]), torch.zeros(1, dtype=torch.bfloat16)
optimizer._multi_tensor_copy_this_to_that([fp32], [bf16], torch.zeros(1, dtype=torch.int))
print(json.dumps([buffer.tolist(), made, bf16.item()]))
""")
    clipped, made, copied = result
    assert clipped == [pytest.approx(0.6, rel=1e-5), 0.0, pytest.approx(0.8, rel=1e-5)]
    assert [name for name in made if "zeros" not in name] == []  # but for the overflow flag
    assert copied == 1.0


def test_buffers_are_exchanged_unless_they_are_all_there_is() -> None:
    result = _python("""
from megatron.core.distributed import param_and_grad_buffer as buffers
calls = []
names = ("dist_all_gather_func", "dist_reduce_scatter_func")
for name in names:
    setattr(buffers, name, lambda *args, name=name, **kwargs: calls.append(name) or "handle")
cpu.install()
whole = torch.arange(4.0)
gather, scatter = (getattr(buffers, name) for name in names)
answers = [gather(whole, whole[:], group=None), scatter(whole[:], whole, op=None, async_op=False)]
alone = list(calls)
# The first of two ranks' shares begins where the whole does.
answers += [gather(whole, whole[:2]), scatter(whole[:2], whole),
            gather(whole, whole[:], async_op=True)]
print(json.dumps([answers, alone, calls]))
""")
    gather, scatter = "dist_all_gather_func", "dist_reduce_scatter_func"
    assert result == [[None, None, *["handle"] * 3], [], [gather, scatter, gather]]
