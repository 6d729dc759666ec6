#include "server-adapter-mem.h"

#include "log.h"

#include "base64.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <random>
#include <sstream>
#include <stdexcept>

// a larger factor could make a state of finite values one that is not
static const float ADAPTER_MEM_SCALE_MAX = 16.0f;

static std::atomic<uint64_t> adapter_mem_counters[SERVER_ADAPTER_MEM_COUNTER_COUNT];

// of this process: a server that was started again is another one, on the same port too
static const std::string & adapter_mem_run() {
    static const std::string run = []() {
        std::random_device rng;
        char               hex[17];
        snprintf(hex, sizeof(hex), "%08x%08x", rng(), rng());
        return std::string(hex);
    }();
    return run;
}

common_json server_adapter_mem_props(const llama_model * model) {
    llama_adapter_mem_info info;
    if (!llama_model_adapter_mem_info(model, &info)) {
        return nullptr;
    }

    common_json layers = common_json::array();
    for (uint32_t i = 0; i < info.n_layer; ++i) {
        layers.push_back(llama_model_adapter_mem_layer(model, i));
    }

    return {
        { "sidecar_sha256", info.sidecar_sha256 },
        { "base_sha256", info.base_sha256 },
        { "fingerprint", info.fingerprint },
        { "layers", layers },
        { "rank", info.rank },
        { "state_heads", info.n_head },
        { "states", info.n_state },
        { "chunk", info.n_chunk },
        { "semantics", info.semantics },
        { "kind", info.kind },
        { "mode", llama_adapter_mem_mode_name(info.mode) },
        { "alpha", info.alpha },
        { "features", common_json::array({ "memory", "continues" }) },
        { "run", adapter_mem_run() },
    };
}

void server_adapter_mem_log(const llama_model * model, const common_params & params, common_context_seq_rm_type seq_rm_type) {
    llama_adapter_mem_info info;
    if (!llama_model_adapter_mem_info(model, &info)) {
        return;
    }

    if (params.n_parallel == 1) {
        LOG_INF("memory: one slot\n");
    } else {
        LOG_INF("memory: %d slots\n", params.n_parallel);
    }
    LOG_INF("memory: prompt cache %s: cache_prompt=%d cache_ram=%d MiB\n",
            params.cache_prompt || params.cache_ram_mib != 0 ? "on" : "off", params.cache_prompt, params.cache_ram_mib);
    LOG_INF("memory: context checkpoints %s: max=%d\n", params.n_ctx_checkpoints > 0 ? "on" : "off", params.n_ctx_checkpoints);
    LOG_INF("memory: warm-up %s\n", params.warmup ? "done" : "skipped");
    if (params.slot_save_path.empty()) {
        LOG_INF("memory: slot save/restore disabled\n");
    } else {
        LOG_INF("memory: slot save/restore enabled: %s\n", params.slot_save_path.c_str());
    }
    // a context that could drop the end of a sequence would let the memory of it stay
    if (seq_rm_type == COMMON_CONTEXT_SEQ_RM_TYPE_FULL && params.n_cache_reuse == 0) {
        LOG_INF("memory: exact-prefix reuse: a prompt reuses a sequence only if it extends all of it\n");
    }
}

//
// memories
//

server_adapter_mem_memory_ptr server_adapter_mem_memory_init(std::vector<float> values) {
    if (std::all_of(values.begin(), values.end(), [](float x) { return x == 0.0f; })) {
        return nullptr;
    }

    char hex[65];
    llama_adapter_mem_hash(values.data(), values.size() * sizeof(float), hex);

    return std::make_shared<const server_adapter_mem_memory>(server_adapter_mem_memory{ std::move(values), hex });
}

// base64.hpp passes over what stands after the padding
static bool adapter_mem_is_base64(const std::string & text) {
    static const char * const digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

    const size_t n = std::min(text.find_first_not_of(digits), text.size());
    return text.size() % 4 == 0 && text.size() - n <= 2 && text.find_first_not_of('=', n) == std::string::npos;
}

server_adapter_mem_memory_ptr server_adapter_mem_decode(const llama_model * model, const std::string & text) {
    if (!adapter_mem_is_base64(text) || text.empty()) {
        throw std::invalid_argument("[state-format] \"memory\" is not the base64 of a memory-only state file");
    }
    const std::string bytes = base64::decode(text, base64::alphabet::standard);

    std::vector<float> values(llama_model_adapter_mem_n_values(model));
    if (!llama_model_adapter_mem_read(model, (const uint8_t *) bytes.data(), bytes.size(), values.data())) {
        throw std::invalid_argument(llama_adapter_mem_state_error());
    }
    return server_adapter_mem_memory_init(std::move(values));
}

std::string server_adapter_mem_encode(const llama_model * model, const std::vector<float> & values) {
    std::string bytes(llama_model_adapter_mem_write(model, values.data(), nullptr, 0), '\0');
    if (bytes.empty() || llama_model_adapter_mem_write(model, values.data(), (uint8_t *) bytes.data(), bytes.size()) == 0) {
        throw std::runtime_error(llama_adapter_mem_state_error());
    }
    return base64::encode(bytes, base64::alphabet::standard);
}

//
// requests
//

// The member of a request that is about the memory, "" if there is none. It was named for the first kind of memory, and
// answers say it as the request does.
static std::string adapter_mem_name(const common_json & data) {
    const auto is_there = [&](const char * name) { return data.is_object() && data.contains(name) && !data.at(name).is_null(); };

    if (is_there("memory_adapter") && is_there("rwkv_ms")) {
        throw std::invalid_argument("\"memory_adapter\" and \"rwkv_ms\" are two names of the same: leave one out");
    }
    return is_there("memory_adapter") ? "memory_adapter" : is_there("rwkv_ms") ? "rwkv_ms"
                                                                               : "";
}

void server_adapter_mem_parse_setting(const common_json & data, const std::string & name, std::optional<bool> & frozen, std::optional<float> & scale) {
    for (const auto & item : data.items()) {
        const auto & value = item.value();

        if (item.key() == "frozen" && value.is_boolean()) {
            frozen = value.get<bool>();
        } else if (item.key() == "scale" && value.is_number() && std::fabs(value.get<double>()) <= ADAPTER_MEM_SCALE_MAX) {
            scale = value.get<float>();
        } else {
            throw std::invalid_argument("\"" + name + "\": \"" + item.key().substr(0, 64) + "\" is not \"frozen\" (true or false) or \"scale\" (a number from -16 to 16)"
                                                                                            ", nor, in a request, \"memory\" (base64 or null) or \"return_memory\" (true or false)");
        }
    }
}

static void adapter_mem_parse(const llama_model * model, common_json data, size_t n_texts, server_adapter_mem_params & params) {
    const auto fail = [&](const char * what) {
        throw std::invalid_argument("\"" + params.name + "\"" + what);
    };

    if (!data.is_object()) {
        fail(" must be an object");
    }
    if (llama_model_adapter_mem_n_values(model) == 0) {
        fail(": this server has no memory: start it with --memory-adapter");
    }

    if (data.contains("return_memory")) {
        const auto value = data.at("return_memory");
        if (!value.is_boolean()) {
            fail(": \"return_memory\" must be true or false");
        }
        data.erase("return_memory");
        params.return_memory = value.get<bool>();
    }
    if (params.return_memory && n_texts > 1) {
        fail(": \"return_memory\" goes with one answer, this request is for several");
    }

    if (data.contains("memory")) {
        const auto memory = data.at("memory");
        if (!memory.is_null() && !memory.is_string()) {
            fail(": \"memory\" must be base64 of a memory-only state file, or null");
        }
        data.erase("memory");

        params.has_memory = true;
        if (memory.is_string()) {
            params.memory = server_adapter_mem_decode(model, memory.get<std::string>());
            server_adapter_mem_count(SERVER_ADAPTER_MEM_MEMORIES);
        }
    }

    server_adapter_mem_parse_setting(data, params.name, params.frozen, params.scale);
}

int server_adapter_mem_parse_slot(const common_json & value, int n_slots) {
    const bool is_int = value.is_number_integer();
    if (!is_int || value.get<double>() < 0 || value.get<double>() >= n_slots) {
        throw std::invalid_argument("slot " + (is_int ? value.dump_safe() : "number") + ": this server has " + std::to_string(n_slots) + ", counted from 0");
    }
    return value.get<int>();
}

int server_adapter_mem_parse(const llama_model * model, const common_json & data, int n_slots, size_t n_texts, server_adapter_mem_params & params) {
    try {
        params.name = adapter_mem_name(data);
        if (!params.name.empty()) {
            adapter_mem_parse(model, data.at(params.name), n_texts, params);
        }
        if (!data.contains("id_slot") || data.at("id_slot").is_null() || data.at("id_slot") == common_json_value(-1)) {
            return -1;
        }
        return server_adapter_mem_parse_slot(data.at("id_slot"), n_slots);
    } catch (const std::exception &) {
        server_adapter_mem_count(SERVER_ADAPTER_MEM_REFUSALS);
        throw;
    }
}

void server_adapter_mem_refuse(const common_json & data) {
    const std::string name = adapter_mem_name(data);
    if (!name.empty()) {
        server_adapter_mem_count(SERVER_ADAPTER_MEM_REFUSALS);
        throw std::invalid_argument("\"" + name + "\": this route reads no memory; leave it out");
    }
}

void server_adapter_mem_forward(const common_json & from, common_json & to) {
    for (const char * name : { "memory_adapter", "rwkv_ms", "id_slot", "cache_prompt" }) {
        if (from.contains(name)) {
            to[name] = from.at(name);
        }
    }
}

common_json server_adapter_mem_attach(common_json answer, const common_json & adapter_mem) {
    if (adapter_mem.is_null()) {
        return answer;
    }
    auto & last = answer.is_array() && !answer.empty() ? answer.back() : answer;
    // events of Anthropic's and OpenAI's streams: the object is in their data
    auto & object = last.contains("data") && last.at("data").is_object() ? last["data"] : last;
    for (const auto & item : adapter_mem.items()) {
        object[item.key()] = item.value();
    }
    return answer;
}

//
// counters
//

void server_adapter_mem_count(server_adapter_mem_counter counter, uint64_t n) {
    adapter_mem_counters[counter] += n;
}

std::string server_adapter_mem_metrics() {
    static const char * const names[SERVER_ADAPTER_MEM_COUNTER_COUNT][2] = {
        { "rwkv_ms_memories_total", "Memories that came with requests." },
        { "rwkv_ms_restores_total", "Slots that were given a memory, or a text with one." },
        { "rwkv_ms_saves_total", "Memories and texts of slots that were saved." },
        { "rwkv_ms_tokens_written_total", "Tokens written to memories." },
        { "rwkv_ms_refusals_total", "Requests and slot actions refused for what they say of a memory or a slot." },
    };

    std::stringstream res;
    for (int i = 0; i < SERVER_ADAPTER_MEM_COUNTER_COUNT; ++i) {
        res << "# HELP llamacpp:" << names[i][0] << " " << names[i][1] << "\n"
            << "# TYPE llamacpp:" << names[i][0] << " counter\n"
            << "llamacpp:" << names[i][0] << " " << adapter_mem_counters[i] << "\n";
    }
    return res.str();
}
