"""The demo on page images: agents that look, drift, look again, on two CPU cores.

Run: ``regrpo vision-demo --out runs/vision-demo``. The pages are drawn, crops are executed, and
what a crop shows is an image to the model.
"""

from regrpo.config import VisionDemoConfig
from regrpo.demo import run_stages
from regrpo.vision_recipe import SHOWN, stages


def run_vision_demo(config: VisionDemoConfig) -> None:
    """Runs every stage and prints, plots and saves the comparison."""
    run_stages(config, SHOWN, stages(config))
