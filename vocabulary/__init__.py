"""What tokenizer.py needs beside its algorithms.

    sentencepiece_file.py   the .model file: pieces, settings, protobuf wire format
    fast_bpe.py             training and encoding as in the textbook, fast
    stream_decoder.py       ids -> text, one id at a time
    scripts.py              the writing system of a character; cutting words by it
    files.py                reading lines, writing a file whole or not at all
    identity.py             what is the same run: contents of files, settings that change results
    records.py              LLaVA records, JSON Lines and text, read record by record
    command.py              number flags, short errors, output on any terminal
    report.py               tokens per character, word and byte; `show`
    bench.py                time and memory of training, beside the libraries

Pipeline: kernels → **vocabulary** → tokenizer → … Nothing here imports tokenizer.py.
"""
