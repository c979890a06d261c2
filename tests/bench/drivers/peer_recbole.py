"RecBole's own SASRec, GRU4Rec and BERT4Rec: their model, data set, loader and trainer, unchanged."
from peer_common import JOB, commands_of, serve, settings


def import_theirs():
    import recbole.config, recbole.data, recbole.utils, recbole.trainer, recbole.model.sequential_recommender


def prepare():
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_seed
    values = settings(benchmark_filename=["train", "valid", "test"], alias_of_item_id=["item_id_list"], loss_type="CE",
                      load_col={"inter": ["user_id", "item_id_list", "item_id"]}, train_neg_sample_args=None, worker=0,
                      metrics=["Hit", "NDCG"], topk=[10, 50], valid_metric="NDCG@10", log_wandb=False)
    if JOB["model"] == "GRU4Rec":
        values.update(embedding_size=values["hidden_size"], num_layers=1, dropout_prob=values["hidden_dropout_prob"])
    config = Config(model=JOB["model"], dataset=JOB["name"], config_dict=values)
    init_seed(config["seed"], config["reproducibility"])
    train, valid, test = data_preparation(config, create_dataset(config))
    model = get_model(config["model"])(config, train._dataset).to(config["device"])
    return commands_of(get_trainer(config["MODEL_TYPE"], config["model"])(config, model), train, test)


if __name__ == "__main__": serve(import_theirs, prepare)
