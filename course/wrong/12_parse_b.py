import json
import re


def parse_object(text):
    # The last of two equal names wins.
    answer = text.rpartition("</think>")[2]
    found = re.fullmatch(r"[^{\[]*(\{.*\})[^}\]]*", answer, re.DOTALL)
    if not found:
        raise ValueError("not one JSON object")
    return json.loads(found[1])
