"""Train, validate and test: `python train.py fit --config configs/quickstart.yaml`."""

import gc
import sys

from gptlit.training.flags import check_names

if __name__ == "__main__":
    check_names(sys.argv[1:])
    gc.disable()  # the imports create hundreds of thousands of objects, none of them garbage
    from gptlit.training.cli import main

    gc.freeze()
    gc.enable()
    main()
