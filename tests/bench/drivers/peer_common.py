"What every driver of a peer shares: the job, the names that newer NumPy dropped, and how their trainer is timed."
import json
import sys
import time
from itertools import islice

from protocol import serve_commands

JOB = json.loads(sys.argv[1])


class FirstBatches:
    "The first n batches of a loader that is otherwise itself."
    def __init__(self, loader, n): self.loader, self.n = loader, n
    def __getattr__(self, name): return getattr(self.loader, name)
    def __iter__(self): return islice(iter(self.loader), self.n)


def load(import_theirs):
    "Import everything that is not the system itself: memory is counted from here on."
    import numpy
    import torch
    old = dict(bool8="bool_", float_="float64", complex_="complex128", object0="object_", unicode_="str_", str0="str_",
               int0="intp", long="int64", int="int64", float="float64", bool="bool_", object="object_", str="str_",
               complex="complex128")
    for name, new in old.items():
        if name not in numpy.__dict__: setattr(numpy, name, getattr(numpy, new))
    torch.set_num_threads(JOB["threads"])
    if JOB["code"]: sys.path.insert(0, JOB["code"])
    import_theirs()


def commands_of(trainer, train, test, start=lambda: None):
    "Return facts about a prepared peer, and the commands that time its own trainer."
    import recbole
    import torch
    def some(steps):
        before = time.perf_counter()
        trainer._train_epoch(FirstBatches(train, steps), 0)
        if torch.cuda.is_initialized(): torch.cuda.synchronize()
        return {"seconds": time.perf_counter() - before, "steps": steps}
    def rank():
        trainer.evaluate(test, load_best_model=False)
        return {"rows": len(theirs(test))}
    theirs = lambda loader: getattr(loader, "_dataset", None) or loader.dataset
    facts = {"steps_per_epoch": len(train), "n_targets": len(theirs(train)), "recbole": recbole.__version__,
             "torch": torch.__version__, "anomaly_mode": torch.is_anomaly_enabled()}
    if test is not None: trainer.eval_collector.data_collect(train)
    return facts, {"train": some, "evaluate": rank, "start": start}


def settings(**more):
    "Name the job's sizes as RecBole does."
    s = JOB["config"]
    return dict(data_path=JOB["folder"], checkpoint_dir=JOB["folder"], use_gpu=JOB["cuda"], show_progress=False,
                state="ERROR", hidden_size=s["hidden_size"], inner_size=s["inner_size"], n_layers=s["n_layers"],
                n_heads=s["n_heads"], hidden_dropout_prob=s["dropout"], attn_dropout_prob=s["dropout"],
                train_batch_size=s["batch_size"], learning_rate=s["lr"], MAX_ITEM_LIST_LENGTH=s["max_len"],
                plm_size=JOB["feature_size"], img_size=JOB["feature_size"], **more)


def serve(import_theirs, prepare):
    "Answer commands about a peer."
    serve_commands(lambda: load(import_theirs), prepare)
