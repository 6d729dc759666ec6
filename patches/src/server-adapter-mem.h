#pragma once

// Whose memory a request gets, as the request says it. See server-adapter-mem-slots.h for what the server does with it.
//
// What a slot holds is f(origin, setting, text): the memory on which its text began, what it was computed under, its tokens.
// The first two are the key of the tokens (server_tokens::key): tokens with other keys have no common prefix, and by that one
// rule the choice of a slot, the prompt cache in RAM, checkpoints and the reuse of a slot's own text are right.

#include "common.h"
#include "json.h"

#include "llama-adapter-mem.h"

#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

// a memory apart from any sequence, never an empty one: that is a null pointer
struct server_adapter_mem_memory {
    std::vector<float> values;
    std::string        sha256; // of the values
};

using server_adapter_mem_memory_ptr = std::shared_ptr<const server_adapter_mem_memory>;

struct server_adapter_mem_setting {
    bool     frozen = false;
    float    scale  = 1.0f;
    uint64_t lora   = 0; // hash of the scales of the LoRA adapters
};

// "memory_adapter" of a request, or "rwkv_ms"
struct server_adapter_mem_params {
    std::string name; // which of the two, "" for none

    std::optional<bool>  frozen;
    std::optional<float> scale;

    bool                          has_memory = false; // "memory" is there: the slot's own is not meant
    server_adapter_mem_memory_ptr memory;

    bool return_memory = false;

    // what the task runs on, once the server knows it
    bool                          is_own = false; // the memory of the slot that the request names
    server_adapter_mem_memory_ptr origin;
    server_adapter_mem_setting    setting;
};

// for /props; null without a memory
common_json server_adapter_mem_props(const llama_model * model);

// one line in the log for each fact about the server that the memory depends on; none without a memory
void server_adapter_mem_log(const llama_model * model, const common_params & params, common_context_seq_rm_type seq_rm_type);

// Reads these and "id_slot" (returned, -1: any) of a request for n_texts answers; throws std::invalid_argument.
int server_adapter_mem_parse(const llama_model * model, const common_json & data, int n_slots, size_t n_texts, server_adapter_mem_params & params);

// "frozen" and "scale" of the object of that name, whose other members are refused
void server_adapter_mem_parse_setting(const common_json & data, const std::string & name, std::optional<bool> & frozen, std::optional<float> & scale);

// a number of a slot; throws std::invalid_argument
int server_adapter_mem_parse_slot(const common_json & value, int n_slots);

// throws std::invalid_argument: the route cannot do what the request asks for
void server_adapter_mem_refuse(const common_json & data);

// what a conversion to another API left out
void server_adapter_mem_forward(const common_json & from, common_json & to);

// base64 of a memory-only state file; throws std::invalid_argument with the reason. Null for an empty memory.
server_adapter_mem_memory_ptr server_adapter_mem_decode(const llama_model * model, const std::string & base64);
std::string                   server_adapter_mem_encode(const llama_model * model, const std::vector<float> & values);

// null if all values are zero
server_adapter_mem_memory_ptr server_adapter_mem_memory_init(std::vector<float> values);

// adds the members that say what became of the memory to the last object of an answer
common_json server_adapter_mem_attach(common_json answer, const common_json & adapter_mem);

// Who asked for a slot action, while it waits for the slot: the main thread asks whether the client is still there.
struct server_adapter_mem_asker {
    std::mutex            mutex;
    std::function<bool()> is_gone; // empty once nobody waits any more
    bool                  is_answered = false;
};

// for /metrics
enum server_adapter_mem_counter {
    SERVER_ADAPTER_MEM_MEMORIES, // came with requests
    SERVER_ADAPTER_MEM_RESTORES, // slots that were given a memory, or a text with one
    SERVER_ADAPTER_MEM_SAVES,
    SERVER_ADAPTER_MEM_TOKENS, // written
    SERVER_ADAPTER_MEM_REFUSALS,
    SERVER_ADAPTER_MEM_COUNTER_COUNT,
};

void        server_adapter_mem_count(server_adapter_mem_counter counter, uint64_t n = 1);
std::string server_adapter_mem_metrics();
