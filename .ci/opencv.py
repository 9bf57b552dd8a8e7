"""Make ``import cv2`` work on machines without a display.

Quantus requires opencv-python and grad-cam its headless twin; both install the folder ``cv2``, and the one that is
left there may need libGL, which servers and containers lack. Then the headless one is put on top.
"""

import subprocess
import sys

HEADLESS = [sys.executable, "-m", "pip", "install", "--force-reinstall", "--no-deps", "opencv-python-headless"]

try:
    import cv2  # noqa: F401
except ImportError as error:
    print(f"opencv: {error}; installing opencv-python-headless over it", flush=True)
    subprocess.run(HEADLESS, check=True)
