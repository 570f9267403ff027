"""An AdaLoRA in the form that everybody reads. Needs no torch."""

from pathlib import Path

from lora_core.factors import FactorFile, write_factors


def to_plain_lora(directory: Path, out: Path) -> None:
    """Write the adapter in `directory` as a plain LoRA to `out`, which must not exist.

    Singular values and scaling go into lora_B, so that lora_alpha is the rank, module by module; modules of which
    nothing is left are not there. A plain LoRA comes out with scaling 1 as well.
    """
    with FactorFile(directory) as file:
        modules = {}
        for path in file.paths:
            found = file.read(path)
            modules[path] = found.with_factors(found.lora_B * found.scaling, found.lora_A)
        write_factors(out, modules, file.about)
