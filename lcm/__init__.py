import os

os.environ.setdefault("WDS_SECURE", "1")  # read when webdataset is imported: it then opens no URL and unpickles nothing
