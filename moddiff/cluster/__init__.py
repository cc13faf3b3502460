"""How are many machines used at once?  Through Ray: whole runs shared out, or one part elsewhere.

    from moddiff import cluster
    made = cluster.generate("runs.sqlite", prompts, seeds=range(10), model="tiny")     # many runs
    text = cluster.actor("text", "/models/Wan2.1-T2V-1.3B", resources={"big": 1})      # one part

Ray is an extra, `pip install "moddiff[ray]"`. It starts the processes, knows which machine has room, and
notices that one is gone; nothing of that is done here. A Ray cluster runs what any of its drivers says, so
its ports belong on a network whose every user you trust; what is started here listens at 127.0.0.1 alone.

many.py      runs over workers, into the file of runs
crew.py      who is at what, and whose work is done again;  worker.py: what a worker does
actors.py    a component in a process of its own, asked without HTTP
starting.py  joining a cluster, or starting one of this machine
"""

from .actors import actor
from .crew import NoRoom
from .many import Made, generate
