#pragma once

// What the server shows of the RWKV-MS memory and does with it, see llama-rwkv-ms.h.

#include "common.h"
#include "json.h"

#include <optional>
#include <string>

// for /props; null without a memory
common_json server_rwkv_ms_props(const llama_model * model);

// for /slots: the memory of one sequence. Waits for the context: only where no decode is running.
common_json server_rwkv_ms_slot(llama_context * ctx, llama_seq_id seq_id);

// one line in the log for each fact about the server that the memory depends on; none without a memory
void server_rwkv_ms_log(const llama_model * model, const common_params & params, common_context_seq_rm_type seq_rm_type);

// {"frozen": true, "scale": 0.5}, each optional: of a request, or the setting of a slot
struct server_rwkv_ms_params {
    std::optional<bool>  frozen;
    std::optional<float> scale;
};

// throws std::invalid_argument; data may be null
server_rwkv_ms_params server_rwkv_ms_params_parse(const common_json & data);

// Gives the sequence the setting of the request, else of the slot, else the default. Returns whether the text of the
// sequence was computed with other deltas: it is removed then, so that the request computes all of it.
bool server_rwkv_ms_params_apply(llama_context * ctx, llama_seq_id seq_id, const server_rwkv_ms_params & slot, const server_rwkv_ms_params & request);

// what POST /slots/{id}?action=memory-... does besides waiting for the slot; throws std::runtime_error with nothing changed.
// Sets *rm_text if the slot has lost its text.
common_json server_rwkv_ms_action(
        llama_context *         ctx,
        llama_seq_id            seq_id,
        const std::string &     action,
        const std::string &     filename,
        const std::string &     filepath,
        const common_json &     data,
        server_rwkv_ms_params & slot,
        bool *                  rm_text);

// the tokens of a slot file, without loading its state; throws std::runtime_error with the exact reason
std::vector<llama_token> server_rwkv_ms_file_tokens(llama_context * ctx, llama_seq_id seq_id, const std::string & filepath);

// the reason why a state was not saved or loaded, for an HTTP answer and in the log; def if there is none
std::string server_rwkv_ms_state_error(llama_seq_id seq_id, const char * def);
