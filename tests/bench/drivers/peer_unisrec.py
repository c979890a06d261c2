"UniSRec's released code: its model and data set, and the rest of RecBole."
import os

from peer_common import JOB, commands_of, serve, settings


def import_theirs():
    import recbole.config, recbole.data, recbole.utils, recbole.trainer, unisrec, data.dataset


def prepare():
    from recbole.config import Config
    from recbole.data import data_preparation
    from recbole.utils import get_trainer, init_seed
    from unisrec import UniSRec
    from data.dataset import UniSRecDataset
    values = settings(train_stage=JOB["stage"], worker=0, log_wandb=False,
                      adaptor_layers=[JOB["feature_size"], JOB["config"]["hidden_size"]])
    files = [os.path.join(JOB["code"], "props", name) for name in ("UniSRec.yaml", "finetune.yaml")]
    config = Config(model=UniSRec, dataset=JOB["name"], config_file_list=files, config_dict=values)
    init_seed(config["seed"], config["reproducibility"])
    train, valid, test = data_preparation(config, UniSRecDataset(config))
    model = UniSRec(config, train.dataset).to(config["device"])
    return commands_of(get_trainer(config["MODEL_TYPE"], config["model"])(config, model), train, test)


if __name__ == "__main__": serve(import_theirs, prepare)
