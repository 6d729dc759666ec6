#pragma once

// What the server shows of the RWKV-MS memory, see llama-rwkv-ms.h.

#include "common.h"
#include "json.h"

// for /props; null without a memory
common_json server_rwkv_ms_props(const llama_model * model);

// for /slots: the memory of one sequence. Waits for the context: only where no decode is running.
common_json server_rwkv_ms_slot(llama_context * ctx, llama_seq_id seq_id);

// one line in the log for each fact about the server that the memory depends on; none without a memory
void server_rwkv_ms_log(const llama_model * model, const common_params & params, common_context_seq_rm_type seq_rm_type);
