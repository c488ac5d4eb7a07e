"""A page in a real browser, without a driver: what a script of the test finds there is read from the page's dump."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_browser() -> str:
    """The path of a Chromium; skips the test where there is none."""
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        pytest.skip(f"none of {', '.join(_NAMES)} is installed: apt-get install chromium")
    return found


def probe(page: Path, script: str, folder: Path) -> Any:
    """Opens a copy of the page in a window of 1400 x 2000 pixels and runs a script in it.

    Args:
        page: an HTML file.
        script: the body of a function; what it returns must be JSON.
        folder: for the copy and the browser's files.

    Returns:
        What the script returned.
    """
    wrapped = f"""<pre id="probe"></pre><script>
      window.addEventListener("load", () => {{
        let result;
        try {{ result = {{found: (() => {{ {script} }})()}}; }} catch (error) {{ result = {{error: error.stack}}; }}
        document.getElementById("probe").textContent = JSON.stringify(result);
      }});</script></body>"""
    copy = folder / "probed.html"
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", wrapped), encoding="utf-8")
    ended = subprocess.run(
        [find_browser(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
         "--window-size=1400,2000", f"--user-data-dir={folder / 'browser'}", "--dump-dom",
         copy.as_uri()],
        capture_output=True, text=True, timeout=240, env={"HOME": str(folder), "PATH": "/usr/bin:/bin"},
    )
    match = re.search(r'<pre id="probe">(.*?)</pre>', ended.stdout, re.DOTALL)
    assert match and match[1], ended.stderr[-3000:]
    result = json.loads(html.unescape(match[1]))
    assert "error" not in result, result["error"]
    return result["found"]
