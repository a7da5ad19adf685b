"""Train, validate and test: `python train.py fit --config configs/quickstart.yaml`."""

import sys

from gptlit.flags import check_names

if __name__ == "__main__":
    check_names(sys.argv[1:])
    from gptlit.training import main

    main()
