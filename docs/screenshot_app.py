"""Remake docs/app.png: the page of `fewstep app` in headless Chromium, a text-to-image generator beside its teacher.

python docs/screenshot_app.py [GENERATOR [TEACHER [PROMPT]]]     default: what `make text-quickstart` has made
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from fewstep.app.serve import launch_app
from fewstep.app.settings import AppSettings

OUT = Path(__file__).with_name("app.png")


def photograph(url: str, path: Path, prompt: str) -> None:
    """Press the button twice, wait for both models, save what is to be seen."""
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 800})
        page.set_default_timeout(300_000)
        page.goto(url)
        for press, seed in enumerate(("7", "8"), start=1):
            page.fill("#prompt textarea", prompt)
            page.fill("#seed textarea, #seed input", seed)
            page.click("#generate")
            page.locator("#history img").nth(4 * press - 1).wait_for()
            page.get_by_text("at work").wait_for(state="detached")
            page.wait_for_timeout(2000)
        page.locator("#about").hover()
        page.screenshot(path=path, full_page=True)
        browser.close()


def main(
    model: str = "runs/text-quickstart",
    teacher: str = "bundled:emoji-sd",
    prompt: str = "grinning face, smileys & emotion",
) -> None:
    """Serve, photograph, stop."""
    served = launch_app(AppSettings(model, teacher=teacher, port=0, guidance_scale=4.0), wait=False)
    photograph(served.local_url, OUT, prompt)
    served.close()
    print(OUT)


if __name__ == "__main__":
    main(*sys.argv[1:])
