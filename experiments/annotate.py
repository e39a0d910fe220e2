"""The scripts as pages for a browser, comments beside the code:  python -m experiments.annotate

Made of the scripts themselves, so there is no second text to keep true. Needs the extra: pip install -e ".[recipes]"
"""

import re
import tempfile
from pathlib import Path

import pycco.main
import tyro

from common.flags import ROOT

WIDER = """
div.docs { max-width: 780px; min-width: 780px; }
.docs pre { font-size: 11px; }
div.code { margin-left: 860px; }
#background { left: 860px; }
"""  # the columns: equations in docstrings have lines of 100 characters


def marked_up(text: str) -> str:
    """Banners become headings; flags in docstrings become code, or Markdown would make one dash of two."""

    def flags(docstring: re.Match) -> str:
        lines = docstring.group().splitlines(keepends=True)
        return "".join(
            line if line.startswith("    python") else re.sub(r"(?<![\w`-])--[a-z-]+(?![^`]*`)", r"`\g<0>`", line)
            for line in lines
        )

    text = re.sub(r"^# --- (\w+) -+$", r"# ## \1", text, flags=re.MULTILINE)
    return re.sub(r'""".*?"""', flags, text, flags=re.DOTALL)


def main(out: Path = Path("annotated")):
    """Args:
    out: folder of the pages
    """
    with tempfile.TemporaryDirectory() as folder:
        copies = [Path(folder) / f"{name}.py" for name in ("a2c_sync", "a3c_async", "off_policy_ac", "sac")]
        for copy in copies:
            copy.write_text(marked_up((ROOT / copy.name).read_text()))
        pycco.main.process(list(map(str, copies)), outdir=str(out), preserve_paths=False)
    with open(out / "pycco.css", "a") as file:
        file.write(WIDER)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
