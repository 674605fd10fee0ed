import logging
import os
import sys

if sys.platform == "win32":
    sys.exit("error: Windows lacks the signals and file locks that this program needs: run it in WSL 2")

os.environ.setdefault("WDS_SECURE", "1")  # webdataset reads this at its import, and then opens no URL and unpickles nothing
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its import warns of a missing package of kernels, in every process
