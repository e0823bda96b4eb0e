"""The SALT loss by its formulas (arXiv 2410.18779), in float64 with full logits, and packed rows. Slow on purpose."""

import torch


def log_softmax(logits_NV):
    return logits_NV - torch.logsumexp(logits_NV, dim=1, keepdim=True)


def salt_reference(
    student_hidden_ND,
    student_head_VD,
    labels_N,
    teacher_hidden_NE=None,
    teacher_head_VE=None,
    kd_weight=0.0,
    teacher_temperature=1.0,
    num_tokens=None,
    student_bias_V=None,
    teacher_bias_V=None,
):
    """Every output of `salt_loss` by name. Inputs are upcast to float64; `loss` is differentiable."""
    valid_N = labels_N != -100
    kept_M = labels_N[valid_N]
    student_MV = _logits(student_hidden_ND, student_head_VD, student_bias_V)[valid_N]
    log_p_MV = log_softmax(student_MV)
    nll_M = -log_p_MV[torch.arange(len(kept_M)), kept_M]
    zero = torch.zeros((), dtype=torch.float64)
    out = dict.fromkeys(["kd_sum", "teacher_ce_sum", "teacher_entropy_sum", "agree_sum", "student_better_sum"], zero)
    out["ce_sum"] = nll_M.sum()
    out["correct_sum"] = (student_MV.argmax(1) == kept_M).sum().double()
    out["tokens"] = valid_N.sum().double()
    if teacher_hidden_NE is not None:
        teacher_MV = _logits(teacher_hidden_NE, teacher_head_VE, teacher_bias_V).detach()[valid_N]
        teacher_nll_M = -log_softmax(teacher_MV)[torch.arange(len(kept_M)), kept_M]
        log_q_MV = log_softmax(teacher_MV / teacher_temperature)
        q_MV = log_q_MV.exp()
        out["kd_sum"] = -(q_MV * log_p_MV[:, : q_MV.shape[1]]).sum()  # entries that the teacher's head lacks have no q
        out["teacher_ce_sum"] = teacher_nll_M.sum()
        out["teacher_entropy_sum"] = -(q_MV * log_q_MV).sum()
        out["agree_sum"] = (student_MV.argmax(1) == teacher_MV.argmax(1)).sum().double()
        out["student_better_sum"] = (nll_M < teacher_nll_M).sum().double()
    denominator = max(1, len(kept_M)) if num_tokens is None else num_tokens
    out["loss"] = ((1 - kd_weight) * out["ce_sum"] + kd_weight * out["kd_sum"]) / denominator
    return out


def stats_reference(hidden_NE, head_VE, labels_N, bias_V=None):
    logits_NV = _logits(hidden_NE, head_VE, bias_V)
    nll_N = torch.zeros(len(labels_N), dtype=torch.float64)
    rank_N = torch.full((len(labels_N),), -1, dtype=torch.int64)
    for i, label in enumerate(labels_N.tolist()):
        if label != -100:
            nll_N[i] = -log_softmax(logits_NV[i : i + 1])[0, label]
            rank_N[i] = (logits_NV[i] > logits_NV[i, label]).sum()
    return nll_N, rank_N


def _logits(hidden_ND, head_VD, bias_V):
    logits_NV = hidden_ND.double() @ head_VD.double().T
    return logits_NV if bias_V is None else logits_NV + bias_V.double()


def packed_rows(docs, byte_counts, sources, width, isolate, eos):
    """Every row of a split by definition, token by token. `docs`: ids without EOS; `byte_counts`: bytes of each id."""
    stream = []
    for d, doc in enumerate(docs):
        for i, token in enumerate([*doc, eos]):
            stream.append((token, d, i == len(doc), [*byte_counts[d], 0][i]))
    rows = []
    for start in range(0, len(stream) - 1, width):
        row = {"input_ids": [], "labels": [], "positions": [], "bytes": [], "sources": []}
        position = 0
        for place in range(start, start + width):
            inside = place < len(stream)
            if isolate and place > start and ((inside and stream[place - 1][2]) or place == len(stream)):
                position = 0  # a document begins, or the padding after the last one
            predicts = inside and not stream[place][2] and place + 1 < len(stream)
            row["input_ids"].append(stream[place][0] if inside else eos)
            row["labels"].append(stream[place + 1][0] if predicts else -100)
            row["positions"].append(position)
            row["bytes"].append(stream[place + 1][3] if predicts else 0)
            row["sources"].append(sources[stream[place][1]] if predicts else -1)
            position += 1
        rows.append(row)
    return rows
