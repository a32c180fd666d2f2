"""Write the golden losses anew.

    python tests/golden/regenerate.py [FAMILY…]

Golden files change alone in a commit, whose message says why the numbers had to change.
"""

import json
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from golden_runs import FAMILIES, config_of, golden_file, run, write_model


def main(families: list[str]) -> None:
    """Write the files of some families, or of all."""
    torch.set_num_threads(1)
    for family in families or FAMILIES:
        with tempfile.TemporaryDirectory() as directory:
            figures = run(write_model(Path(directory) / family, family))
        content = {
            "config": config_of(family),
            "written_with": {
                "machine": platform.machine(),
                **{name: version(name) for name in ("torch", "megatron-core")},
            },
            **figures,
        }
        partial = golden_file(family).with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
        partial.replace(golden_file(family))
        print(f"{family}: loss {figures['losses'][0]:.4f} → {figures['losses'][-1]:.4f}")


if __name__ == "__main__":
    main(sys.argv[1:])
