"""What `deepspeed` (or torchrun, or plain python) starts on each rank: `deepspeed launch/train.py --job jobs/NAME.yaml`."""

import sys

from dst_train.train import main

if __name__ == "__main__":  # data workers import it again
    sys.exit(main())
