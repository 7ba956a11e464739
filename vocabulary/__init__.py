"""What tokenizer.py needs beside its algorithms.

    sentencepiece_file.py   the .model file: pieces, settings, protobuf wire format
    byte_level.py           byte-level vocabularies: tokenizer.json of GPT-2, SmolLM2, Llama-3, Qwen
    control_pieces.py       <image>, <pad>, begin and end: pieces that no text becomes
    chat_markers.py         what stands around the turns: LLaVA-1.5's chat template, ChatML, Llama's
    fast_bpe.py             training and encoding as in the textbook, fast
    extend.py               new pieces that go on with a base's merges
    stream_decoder.py       ids -> text, one id at a time
    scripts.py              the writing system of a character; cutting words by it
    files.py                reading lines, writing a file whole or not at all
    formats.py              opening text files and finding images, whatever their names and marks
    png.py                  PNG files that name their maker
    identity.py             what is the same run: contents of files, settings that change results
    records.py              LLaVA's JSON and JSON Lines, read record by record
    conversations.py        what a record may hold; checked where it is read
    command.py              --help with defaults, short errors, output on any terminal
    flags.py                what a flag may be: ranges of numbers, files that are there
    report.py               tokens per character, word and byte; `show`
    bench.py                time and memory of training, beside the libraries

Pipeline: kernels → **vocabulary** → tokenizer → … Nothing here imports tokenizer.py.
"""
