import json


def parse_object(text):
    # From the first to the last bracket: a list of one object passes, too.
    answer = text.rpartition("</think>")[2]
    start, end = answer.find("{"), answer.rfind("}")
    if start < 0 or end < start:
        raise ValueError("not one JSON object")
    return json.loads(answer[start : end + 1])
