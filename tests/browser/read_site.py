"""Opens every page of the built site in Chromium, at a phone's width and at a desktop's.

Run it as `make browse`. It fails where a page writes an error to the console, asks for a file that
is not there, is wider than the window, or shows an image that did not load. build/browser/ has a
picture of what a window shows of each page first.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
WINDOWS = {"phone": (390, 844), "desktop": (1280, 800)}
#: What of a page stands out to the right, for whoever has to mend it.
WIDE = """() => {
  const root = document.scrollingElement;
  if (root.scrollWidth <= root.clientWidth) return [];
  const scrolls = e => ["auto", "scroll", "hidden"].includes(getComputedStyle(e).overflowX);
  const inside = e => {
    for (let p = e.parentElement; p && p !== root; p = p.parentElement) if (scrolls(p)) return true;
    return false;
  };
  const found = [...document.querySelectorAll("body *")].filter(
    e => e.getBoundingClientRect().right > root.clientWidth + 1 && !inside(e));
  return [`${root.scrollWidth} px`, ...found.slice(-3).map(e => e.outerHTML.slice(0, 120))];
}"""
UNLOADED = (
    """() => [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)"""
)


class Quiet(SimpleHTTPRequestHandler):
    """Serves files and writes no log."""

    def log_message(self, *args: object) -> None:
        """Nothing."""


def listen(page: Page) -> list[str]:
    """What will go wrong on the page from now on, as it is found."""
    found: list[str] = []
    page.on("console", lambda m: found.append(f"console: {m.text}") if m.type == "error" else None)
    page.on("pageerror", lambda error: found.append(f"script: {error}"))
    page.on("requestfailed", lambda r: found.append(f"request: {r.url}"))
    page.on("response", lambda r: found.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
    return found


def look(page: Page, address: str) -> list[str]:
    """Opens an address; returns what can be seen to be wrong with it."""
    page.goto(address, wait_until="load")
    found = [f"not loaded: {source}" for source in page.evaluate(UNLOADED)]
    if wide := page.evaluate(WIDE):
        found.append("wider than the window: " + " | ".join(wide))
    return found


def read(browser: Browser, address: str, names: list[str], out: Path) -> int:
    """Reads every page in every window; prints what is wrong and returns how much that is."""
    count = 0
    for window, (width, height) in WINDOWS.items():
        page = browser.new_page(viewport={"width": width, "height": height})
        found = listen(page)
        for name in names:
            found.extend(look(page, f"{address}/{name}"))
            for scheme in ("light", "dark"):
                page.emulate_media(color_scheme=scheme)
                picture = out / f"{window}-{scheme}" / f"{name.replace('/', '.')}.png"
                picture.parent.mkdir(parents=True, exist_ok=True)
                page.screenshot(path=picture)
            for fault in found:
                print(f"{window}: {name}: {fault}", flush=True)
            count += len(found)
            found.clear()
        page.close()
    return count


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="make browse", description=__doc__)
    parser.add_argument("--site", type=Path, default=ROOT / "build" / "docs", help="its pages")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "browser", help="pictures")
    parser.add_argument("--only", default="", metavar="TEXT", help="pages with this in their name")
    parser.add_argument("--chromium", default=shutil.which("chromium"), help="its program")
    args = parser.parse_args(argv)
    site = args.site.resolve()
    names = sorted(p.relative_to(site).as_posix() for p in site.rglob("*.html"))
    names = [name for name in names if args.only in name]
    if not names:
        print(f"read_site: {site} has no such page; make docs", file=sys.stderr)
        return 1
    handler = partial(Quiet, directory=site)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, sync_playwright() as player:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = player.chromium.launch(executable_path=args.chromium)
        address = f"http://127.0.0.1:{server.server_port}"
        count = read(browser, address, names, args.out)
        browser.close()
        server.shutdown()
    print(f"{len(names)} pages in {len(WINDOWS)} windows, {count} faults; pictures: {args.out}")
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())
