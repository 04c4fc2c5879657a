"""The page in a real browser without a screen: everything of the table is seen at 1,400 pixels, and the console is silent."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from microglia.report.write import report

ROOT = Path(__file__).parent.parent.parent
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROBE = """<script>
const faults = [];
addEventListener("error", event => faults.push(String(event.message)));
addEventListener("securitypolicyviolation", event => faults.push("policy: " + event.violatedDirective));
addEventListener("load", () => setTimeout(() => {
  const right = cell => cell.getBoundingClientRect().right, first = document.querySelector("tbody tr td");
  const probe = document.createElement("pre");
  probe.id = "probe";
  const told = {
    faults,
    width: innerWidth,
    scrolls: [...document.querySelectorAll(".scroll")].map(box => box.scrollWidth - box.clientWidth),
    heads: [...document.querySelectorAll("thead th")].map(cell => [cell.innerText.trim(), right(cell)]),
    dense: document.querySelectorAll("tr.dense").length,
    sticky: getComputedStyle(first).position,
    bars: [...document.querySelectorAll(".bar i")].map(bar => bar.getBoundingClientRect().width),
    opening: document.querySelector(".opening").innerText,
    paper: getComputedStyle(document.body).backgroundColor,
    plots: [...document.querySelectorAll(".plotly-graph-div")].map(plot => plot._fullLayout.paper_bgcolor),
  };
  document.querySelector("#methods input").click();
  told.left = [...document.querySelectorAll(".bar[data-method]")].filter(bar => !bar.hidden).length;
  told.all = document.querySelectorAll(".bar[data-method]").length;
  probe.textContent = JSON.stringify(told);
  document.body.append(probe);
}, 300));
</script></head>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if BROWSER is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    place = tmp_path_factory.mktemp("page")
    written = report([ROOT / "results" / "shrinkbench_resnet20.json", ROOT / "results" / "resnet20_magnitude.json"], place)
    probed = place / "probed.html"
    probed.write_text(written.page.read_text().replace("</head>", PROBE, 1))
    return probed


def seen(page: Path, *options: str, width: int = 1400) -> tuple[dict, str]:
    """Returns what the page tells of itself in a window of a width, and what the console says."""
    words = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--enable-logging=stderr",
        "--hide-scrollbars",
    ]
    words += [f"--user-data-dir={page.parent / 'profile'}", f"--window-size={width},2000", "--virtual-time-budget=5000"]
    done = subprocess.run(
        [str(BROWSER), *words, *options, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=240, check=False
    )
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    said = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return json.loads(html.unescape(found[1])), said


def test_the_whole_table_is_seen_at_1400_pixels_and_the_console_is_silent(page: Path) -> None:
    told, said = seen(page)
    assert told["width"] == 1400
    assert told["faults"] == []
    assert said == ""
    assert told["scrolls"] == [0] * len(told["scrolls"])
    heads = dict(told["heads"])
    assert {"method", "measured speed-up", "bytes, zipped"} <= set(heads)
    assert max(heads.values()) <= 1400
    assert told["dense"] == 1
    assert told["sticky"] == "sticky"
    assert len(told["bars"]) == told["all"] + 1
    assert max(told["bars"]) > 400
    assert min(told["bars"]) >= 1
    assert 0 < told["left"] < told["all"]  # one method was switched off
    assert re.search(r"the dense model has \d\d\.\d\d %.* stays nearest .* has the smallest zipped file", told["opening"])
    assert told["paper"] == "rgb(255, 255, 255)"


def test_in_a_dark_room_the_page_and_its_figures_are_dark(page: Path) -> None:
    told, said = seen(page, "--blink-settings=preferredColorScheme=0")
    assert (told["faults"], said) == ([], "")
    assert told["paper"] == "rgb(22, 24, 28)"
    assert set(told["plots"]) == {"#16181c"}
