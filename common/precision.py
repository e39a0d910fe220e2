"""--matmul-precision: by which route float32 matrices are multiplied."""

import time

import torch


def choose_precision(wanted: str, agent: torch.nn.Module, device: torch.device, saved: str | None = None) -> str:
    """The value for torch.set_float32_matmul_precision: `wanted`, or for auto float32's accuracy by the fastest route.

    On a CPU "highest" means MKL and "medium" oneDNN, which AMD's processors may run twice as fast. oneDNN computes in
    bfloat16 then, if the processor has matrix units for it, and else still in float32: so auto looks at the errors.
    `saved`: what it chose when the run began, which a resumed run keeps where that is as exact.
    """
    if wanted != "auto" or device.type != "cpu":
        return "highest" if wanted == "auto" else wanted
    before, errors, times = torch.get_float32_matmul_precision(), {}, {}
    rows, columns = max((p.shape[-2:] for p in agent.parameters() if p.dim() in (2, 3)), key=torch.Size.numel)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator) for shape in ((256, rows), (rows, columns)))
    exact = a.double() @ b.double()
    for _ in range(20):  # in turn, since other processes may be busy
        for precision in ("highest", "medium"):
            torch.set_float32_matmul_precision(precision)
            start = time.perf_counter()
            product = multiply(a, b)
            times[precision] = min(times.get(precision, 1.0), time.perf_counter() - start)
            errors[precision] = (product - exact).abs().max()
    torch.set_float32_matmul_precision(before)
    if errors["medium"] > 2 * errors["highest"]:
        return "highest"
    return saved or ("medium" if 1.3 * times["medium"] < times["highest"] else "highest")


multiply = torch.matmul


def get_precision() -> tuple[str, str]:
    """Of this process: that of matrix products, and that of a CPU's convolutions."""
    return torch.get_float32_matmul_precision(), torch.backends.mkldnn.conv.fp32_precision


def set_precision(products: str, convolutions: str = "none"):
    torch.set_float32_matmul_precision(products)
    torch.backends.mkldnn.conv.fp32_precision = convolutions
