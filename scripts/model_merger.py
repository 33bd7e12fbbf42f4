"""Merges the shards of a checkpoint, EasyR1's or ours, into an ordinary Hugging Face model beside them.

python scripts/model_merger.py --local_dir checkpoints/easy_r1/my_run/global_step_100/actor
"""

from papo.tools.export.merger import main

if __name__ == "__main__":
    main()
