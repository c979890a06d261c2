"""MISSRec's released code, with its own copy of RecBole.

Its k-means needs CUDA kernels, so its own density-peak routine takes its place; its pre-training, which only runs on
several GPUs, runs as one process of a group of one. Interests are found when a round starts, as ours are.
"""
import os
import sys
import types

from peer_common import JOB, commands_of, serve, settings


def import_theirs():
    for name in ("torchpq", "torchpq.clustering"): sys.modules[name] = types.ModuleType(name)
    sys.modules["torchpq.clustering"].MinibatchKMeans = None
    import config, trainer, missrec, data.dataset, data.dataloader


def prepare():
    import torch, trainer as theirs
    from recbole.data import data_preparation
    from recbole.utils import init_seed
    from cluster_utils import cluster_dpc_knn
    from config import Config
    from data.dataloader import CustomizedTrainDataLoader
    from data.dataset import MISSRecDataset, PretrainMISSRecDataset
    from missrec import MISSRec
    first = JOB["stage"] == "pretrain"
    values = settings(train_stage=JOB["stage"], ddp=False, rank=0, world_size=1)
    files = [os.path.join(JOB["code"], "props", name)
             for name in ("MISSRec.yaml", "pretrain.yaml" if first else "finetune.yaml")]
    config = Config(model=MISSRec, dataset=JOB["name"], config_file_list=files, config_dict=values)
    init_seed(config["seed"], config["reproducibility"])
    if first:
        meeting = "file://" + os.path.join(JOB["folder"], "meeting")
        torch.distributed.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
        theirs.DDPMISSRecPretrainTrainer._build_distribute = lambda self, rank, world_size: 0
        train = CustomizedTrainDataLoader(config, PretrainMISSRecDataset(config).build()[0], None, shuffle=True)
        test = None
    else: train, valid, test = data_preparation(config, MISSRecDataset(config))
    model = MISSRec(config, train.dataset).to(config["device"])
    trainer = (theirs.DDPMISSRecPretrainTrainer if first else theirs.MISSRecTrainer)(config, model)
    knows = train.dataset if first else model
    theirs.cluster_kmeans = lambda tokens, cluster_num: cluster_dpc_knn(tokens, cluster_num, knows.knn_local_size)
    discover = trainer._multimodal_interest_discovery
    trainer._multimodal_interest_discovery = lambda *args, **options: None  # timed apart, since it is once an epoch
    start = (lambda: discover(train, 0, train.batch_size)) if first else (lambda: discover(0))
    start()
    return commands_of(trainer, train, test, start)


if __name__ == "__main__": serve(import_theirs, prepare)
