"""The registered parts in llm_jax.extras: {kind: {name: module below llm_jax.extras}}.

A registry imports a module when one of its names is first used.
"""

TABLE: dict[str, dict[str, str]] = {
    'model': {'encdec': 'encdec', 'byte_patch': 'byte_patch'},
    'task': dict.fromkeys(('fim', 'prefix_lm', 'span_corruption', 'seq2seq', 'pairs', 'masked_tokens', 'classification',
                           'regression'), 'tasks') | dict.fromkeys(('chat', 'preference'), 'chat_tasks'),
    'einsum': {'bitnet': 'bitnet', 'int8': 'lowbit', 'fp8': 'lowbit', 'packed': 'bitnet'},
    'loss': {'classification': 'labels', 'regression': 'labels', 'contrastive': 'contrastive',
             'distillation': 'distillation'},
    'balance': {'uncertainty': 'balances', 'grad_norm': 'balances'},
    'transform': {'grokfast_ema': 'grokfast', 'grokfast_ma': 'grokfast', 'soap': 'soap', 'bitnet_flips': 'bitnet_flips',
                  'reduce_on_plateau': 'adaptive', 'noise_adaptive': 'adaptive', 'adafactor': 'optimizers',
                  'ademamix': 'optimizers', 'prodigy': 'optimizers', 'schedule_free': 'optimizers', 'l2': 'optimizers',
                  'adaptive_grad_clip': 'optimizers', 'skip_spikes': 'spikes'},
    'schedule': {'one_cycle': 'schedules', 'cyclic': 'schedules', 'restarts': 'schedules', 'polynomial': 'schedules',
                 'phases': 'schedules', 'composite': 'schedules'},
    'format': {'json': 'formats.text_tables', 'csv': 'formats.text_tables', 'tsv': 'formats.text_tables',
               'toml': 'formats.text_tables', 'sqlite': 'formats.sqlite', 'parquet': 'formats.columnar',
               'arrow': 'formats.columnar', 'huggingface': 'formats.columnar', 'hdf5': 'formats.arrays',
               'npy': 'formats.arrays', 'npz': 'formats.arrays', 'arrayrecord': 'formats.record_files',
               'tfrecord': 'formats.record_files', 'pickle': 'formats.pickles', 'synthetic': 'named',
               'modular': 'named'},
    'source': {'url': 'fetch', 'hf': 'formats.columnar', 'enwik8': 'named', 'synthetic': 'named', 'modular': 'named'},
    'rules': {'quality': 'filters'},
    'tokenizer': {'word': 'word_tokenizer'},
    'opened_tokenizer': {'sentencepiece': 'outside_tokenizers', 'tiktoken': 'outside_tokenizers'},
    'loader': {'stream': 'streaming', 'shards': 'shards', 'dask': 'dask_shards', 'remote': 'remote_store'},
    'storage': {'remote': 'remote_run'},
    'unpacker': {'archive': 'archives', 'stream': 'compression'},
    'exporter': {'packed': 'bitnet_pack'},
    'validator': {'wgsl': 'wgsl'},
    'logger': {'csv': 'loggers', 'wandb': 'loggers'},
    'callback': {'replica_check': 'replicas', 'rewind_spikes': 'spikes'},
    'answer_metric': {'bleu': 'answer_metrics', 'word_precision': 'answer_metrics', 'word_recall': 'answer_metrics',
                      'word_f1': 'answer_metrics'},
}
