"""Learn, run and extend multimodal sequential recommendation.

Public names load on first use: `import mmseqrec` itself imports neither torch nor transformers, polars or matplotlib.
Everything else that a module exports is reached through the module, as in `mmseqrec.blocks.losses.info_nce`.
"""
__version__ = "0.1.0"

PUBLIC = {  # module -> the names that `import mmseqrec as mm` offers
    "core": "check_shape derive_seed get_device set_seed",
    "artifacts": "artifact_path compute_or_load download",
    "figures": "COLORS open_image plot_bars plot_heatmap plot_images plot_lines plot_rows set_style",
    "data.synthetic": "Marketplace dataset_statistics make_caption_corpus make_marketplace plot_items",
    "data.interactions": "TEST TRAIN VALID Interactions Split combine_domains global_time_split hold_out_items "
                         "interaction_statistics k_core leave_one_out load_split make_interactions read_interactions "
                         "save_split",
    "data.items": "ItemTable check_images read_items",
    "data.sources": "download_images fetch_source read_amazon read_atomic read_benchmark read_movielens",
    "data.sequences": "Batch SequenceStore collate expand_prefixes position_batches prefix_batches",
    "features.clip": "load_clip load_shipped_clip retrieval_recall train_clip",
    "features.encoders": "Catalogue build_catalogue catalogue_from_arrays load_image_encoder load_text_encoder "
                         "nearest_items resolve_encoders",
    "features.keywords": "Keywords keyword_catalogue keyword_vocabulary load_word_encoder plot_keywords top_words",
    "blocks.layers": "AttentionPooling MixtureOfExperts SequenceEncoder TransformerBlock "
                     "WhiteningExperts",
    "blocks.augment": "cloze drop_items swap_streams",
    "blocks.losses": "full_softmax_cross_entropy info_nce interest_diversity",
    "blocks.contrastive": "cross_modality_loss modality_combination_loss next_item_loss sequence_item_loss "
                          "sequence_sequence_loss",
    "blocks.interests": "Interests cluster_dpc_knn cluster_kmeans discover_interests",
    "blocks.interest_decoder": "InterestEncoderDecoder",
    "blocks.towers": "ContentEmbedding IDEmbedding next_item_softmax read_histories",
    "recommender": "Items Recommendation Recommender export_vectors top_items transfer_weights",
    "metrics": "bootstrap_interval coverage_at_k map_at_k mean_interval mrr ndcg_at_k novelty paired_interval "
               "precision_at_k rank_of_target recall_at_k",
    "evaluation": "Evaluation compare_evaluations evaluate history_groups plot_slices popularity_groups slice_table",
    "training": "History fit plot_fit",
    "viz.embeddings": "modality_gap pca_2d plot_map plot_modality_gap plot_picture_map umap_2d",
    "viz.attention": "plot_history plot_interest_attention",
    "config": "RunConfig",
    "models.baselines": "BERT4Rec ContentSASRec GRU4Rec Markov Popularity SASRec",
    "models.unisrec": "UniSRec",
    "models.m2se": "M2SE",
    "models.mp4sr": "MP4SR MSM4SR",
    "models.mmsrec": "MMSRec pair_store",
    "models.missrec": "MISSRec interest_attention",
    "experiments.run": "Run prepare_data result_table run_all run_system",
    "experiments.gallery": "open_gallery",
    "viz.explorers": "explore",
    "app.report": "write_report",
}

SAVED = {"models.classical": "ContentKNN EASE ItemKNN"}  # found by name, too, where a saved model names its class


def __getattr__(name):
    from importlib import import_module

    if name.startswith("__"): raise AttributeError(name)
    for module, names in (PUBLIC | SAVED).items():
        if name in names.split(): return getattr(import_module(f"{__name__}.{module}"), name)
    try: return import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}": raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__():
    return sorted({*globals(), *(name for names in PUBLIC.values() for name in names.split())})
