"""The exact PTX of each operator, launched through the CUDA driver as TensorRT would, against the torch operator."""

import importlib
from typing import Any

import torch
from cuda_driver import Argument, Driver, int32, pointer
from gpu_operators import Case, Inputs, cases, configuration_of, is_bar, make_inputs, problem
from gpu_record import Found, Job
from torch import Tensor

from dat_deploy.model import FUSED
from dat_deploy.plugins.launch import Launch

__all__ = ["arguments", "jobs", "launch_by_hand"]


def arguments(launch: Launch, inputs: Inputs, output: Tensor) -> list[Argument]:
    """Pointers to the inputs, int32 scalars, the pointer to the output: the order of ahead-of-time plugins."""
    pointers = [pointer(inputs[name].data_ptr()) for name in launch.inputs]
    return [*pointers, *(int32(value) for value in launch.scalars.values()), pointer(output.data_ptr())]


def launch_by_hand(case: Case, gpu: Any) -> Found:
    """Compile the launch that the torch operator makes, ahead of time, launch it by hand, and compare bit for bit."""
    from dat_deploy.plugins.ahead_of_time import compile_launch, newest_ptx_version

    kernel = importlib.import_module(f"dat_deploy.plugins.{case.operator}.kernel")
    inputs = make_inputs(case, 0, gpu.device)
    expected = getattr(FUSED, case.operator)(**inputs, **case.attributes)
    output = torch.full_like(expected, float("nan"))  # what is not written shows
    launch = kernel.launch(problem(case, inputs), configuration_of(case, inputs)[0])
    dtypes = {name: tensor.dtype for name, tensor in inputs.items()} | {"output": output.dtype}
    driver = Driver()
    version = newest_ptx_version(gpu.capability, driver.version())
    compiled = compile_launch(launch, dtypes, gpu.capability, ptx_version=version)
    gpu.synchronize()
    module = driver.load(compiled.ptx)
    stream = torch.cuda.current_stream().cuda_stream
    function, held = driver.function(module, compiled.name), arguments(launch, inputs, output)
    driver.launch(function, launch.grid, launch.block, compiled.shared_memory_bytes, stream, held)
    gpu.synchronize()
    driver.unload(module)
    difference = (output.double() - expected.double()).abs().max().item()
    numbers = {
        "identical": float(torch.equal(output, expected)),
        "max_difference": difference,
        "largest_output": expected.abs().max().item(),
        "ptx_version": version / 10,
        "ptx_bytes": len(compiled.ptx),
        "shared_memory_bytes": compiled.shared_memory_bytes,
        "registers": compiled.registers,
        "spilled_bytes": compiled.spilled_bytes,
    }
    same = bool(numbers["identical"])
    return Found(numbers, error=None if same else f"the PTX and the torch operator differ, by up to {difference:.3g}")


def jobs() -> list[Job]:
    """One shape an operator: that of the targets, and the largest maps of `base`, shifted, and of `pp-base`."""
    found: dict[str, Case] = {}
    for case, users in cases().items():
        if is_bar(case, users):
            found[case.operator] = case
        elif (
            case.batch == 64
            and any(user.startswith(("base ", "pp-base ")) for user in users)
            and (case.shift_size or not case.window_size)
        ):
            found.setdefault(case.operator, case)

    def job(case: Case) -> Job:
        labels = {"operator": case.operator, "shape": case.shape, "batch": str(case.batch)}
        key = f"ptx/{case.operator}"
        return Job(key, "ptx", "ptx", labels, 4.0, lambda gpu, record, path: launch_by_hand(case, gpu))

    return [job(case) for case in found.values()]
