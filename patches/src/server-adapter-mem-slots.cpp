#include "server-adapter-mem-slots.h"

#include "log.h"
#include "server-http.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

// an answer of a slot action
struct server_task_result_adapter_mem : server_task_result {
    server_task_result_adapter_mem(common_json data, bool failed) : data(std::move(data)), failed(failed) {}

    common_json data;
    bool        failed;

    bool        is_error() override { return failed; }
    common_json to_json() override { return data; }
};

// "[slot-busy]" and "[state-continues]": what was asked for is not against the rules, but against how things are now
struct adapter_mem_conflict : std::runtime_error {
    using std::runtime_error::runtime_error;
};

static server_task_result_ptr adapter_mem_failed(const std::string & what, error_type type, bool is_conflict = false) {
    auto data = format_error_response(what, type);
    if (is_conflict) {
        data["code"] = 409;
        data["type"] = "conflict_error";
    }
    server_adapter_mem_count(SERVER_ADAPTER_MEM_REFUSALS);
    return std::make_unique<server_task_result_adapter_mem>(std::move(data), true);
}

static server_task_result_ptr adapter_mem_busy(int id_slot) {
    return adapter_mem_failed(string_format("[slot-busy] slot %d was at work until the time was up: nothing was done; ask again, or with a longer \"timeout\"", id_slot),
            ERROR_TYPE_INVALID_REQUEST, true);
}

// the reason why a state was not saved or loaded; def if there is none
static std::string adapter_mem_reason(int id_slot, const char * def) {
    const std::string what = llama_adapter_mem_state_error();
    if (what.empty()) {
        return def;
    }
    LOG_WRN("memory: slot %d: rolled back, nothing is changed: %s\n", id_slot, what.c_str());
    return what;
}

static std::string adapter_mem_hash(const void * data, size_t size) {
    char hex[65];
    llama_adapter_mem_hash(data, size, hex);
    return hex;
}

static common_json adapter_mem_sha256(const server_adapter_mem_memory_ptr & memory) {
    return memory ? common_json(memory->sha256) : common_json(nullptr);
}

//
// server_adapter_mem
//

void server_adapter_mem::init(llama_context * ctx, int n_slots) {
    this->ctx = ctx;

    n_values = llama_model_adapter_mem_n_values(model());
    slots.resize(n_slots);
}

// adapters that are switched on within the text are not part of what its beginning depends on
static uint64_t adapter_mem_lora_hash(const std::vector<common_adapter_lora_info> & lora) {
    std::string scales;
    for (const auto & info : lora) {
        if (info.scale != 0.0f && info.ptr && llama_adapter_get_alora_n_invocation_tokens(info.ptr) == 0) {
            scales += info.path + ":" + std::to_string(info.scale) + ";";
        }
    }
    return scales.empty() ? 0 : std::stoull(adapter_mem_hash(scales.data(), scales.size()).substr(0, 16), nullptr, 16);
}

// [TAG_ADAPTER_MEM_KEY] what a text depends on besides its tokens; "" for an empty memory and the default setting, as in a base
static std::string adapter_mem_key(const server_adapter_mem_memory_ptr & origin, const server_adapter_mem_setting & setting) {
    const server_adapter_mem_setting def;
    if (!origin && setting.frozen == def.frozen && setting.scale == def.scale && setting.lora == def.lora) {
        return "";
    }
    return string_format("%s %d %a %016llx", origin ? origin->sha256.c_str() : "", setting.frozen, setting.scale, (unsigned long long) setting.lora);
}

void server_adapter_mem::prepare(server_task & task, const std::vector<common_adapter_lora_info> & lora) const {
    if (!has_memory()) {
        return;
    }

    auto & params = task.params.adapter_mem;

    params.is_own = task.id_slot >= 0 && !params.has_memory;

    const slot_memory   none;
    const slot_memory & own = params.is_own ? slots[task.id_slot] : none;

    params.origin  = params.is_own ? own.origin : params.memory;
    params.setting = { params.frozen.value_or(own.frozen), params.scale.value_or(own.scale), adapter_mem_lora_hash(lora) };

    task.tokens.key = adapter_mem_key(params.origin, params.setting);

    for (auto & child : task.child_tasks) {
        child.params.adapter_mem        = params;
        child.params.adapter_mem.is_own = false;
        child.tokens.key                = task.tokens.key;
    }
}

void server_adapter_mem::begin(int id_slot, server_prompt & prompt, const server_task & task) {
    if (!has_memory()) {
        return;
    }

    const auto & params = task.params.adapter_mem;

    if (prompt.tokens.empty() || prompt.tokens.key != task.tokens.key) {
        prompt.clear();
        llama_adapter_mem_seq_start(ctx, id_slot, params.origin ? params.origin->values.data() : nullptr);
    }
    prompt.tokens.key = task.tokens.key;

    llama_adapter_mem_seq_set(ctx, id_slot, params.setting.frozen, params.setting.scale);
    llama_adapter_mem_seq_set_tag(ctx, id_slot, params.setting.lora);

    slots[id_slot].is_running = params.is_own;
}

std::string server_adapter_mem::check(int id_slot) const {
    if (!has_memory() || llama_model_adapter_mem_check(model(), get_values(id_slot).data())) {
        return "";
    }
    return "[state-values] the memory of this text is not finite: nothing of it is kept";
}

common_json server_adapter_mem::result(int id_slot, const server_task & task, int n_reused) const {
    if (task.params.adapter_mem.name.empty()) {
        return nullptr;
    }

    const auto values = get_values(id_slot);

    common_json res = {
        { "origin", adapter_mem_sha256(task.params.adapter_mem.origin) },
        { "tokens_written", llama_model_adapter_mem_get_state(model(), values.data(), 0, nullptr, nullptr) },
        { "reused", n_reused },
    };
    if (task.params.adapter_mem.return_memory) {
        res["memory"] = server_adapter_mem_encode(model(), values);
    }
    return { { task.params.adapter_mem.name, res } };
}

void server_adapter_mem::end(int id_slot, const server_prompt & prompt, const server_task & task, uint64_t n_computed) {
    if (!has_memory()) {
        return;
    }

    auto & slot = slots[id_slot];

    slot.is_running = false;

    const auto & params = task.params.adapter_mem;
    if (!params.setting.frozen) {
        server_adapter_mem_count(SERVER_ADAPTER_MEM_TOKENS, n_computed);
    }

    // a memory that is only read is not one that was learnt
    if (!params.is_own || params.setting.frozen || prompt.tokens.empty() || prompt.tokens.key != task.tokens.key) {
        return;
    }

    // a failed batch took the text away, or a part of it was never computed
    if (llama_memory_seq_pos_max(llama_get_memory(ctx), id_slot) + 1 != prompt.tokens.pos_next()) {
        return;
    }

    auto values = get_values(id_slot);
    if (!llama_model_adapter_mem_check(model(), values.data())) {
        return;
    }

    slot.is_kept = true;
    slot.origin  = params.origin;
    slot.values  = std::move(values);
    slot.text    = prompt.tokens.get_tokens();
    slot.setting = params.setting;
}

std::vector<float> server_adapter_mem::get_values(int id_slot) const {
    std::vector<float> res(n_values);
    llama_adapter_mem_seq_get_values(ctx, id_slot, res.data());
    return res;
}

server_adapter_mem::slot_memory server_adapter_mem::get_own(int id_slot, const server_prompt & prompt) const {
    slot_memory res = slots[id_slot];

    if (res.is_running || (!res.is_kept && prompt.tokens.key.empty())) {
        res.values = get_values(id_slot);
        res.text   = prompt.tokens.get_tokens();
    } else if (!res.is_kept) {
        // what is in the slot was computed on a memory that came with a request: it is that client's
        res.values.assign(n_values, 0.0f);
    }
    return res;
}

// what /slots and memory-save say of it
common_json server_adapter_mem::state(const slot_memory & own) const {
    return {
        { "tokens_written", llama_model_adapter_mem_get_state(model(), own.values.data(), 0, nullptr, nullptr) },
        { "origin", adapter_mem_sha256(own.origin) },
        { "n_text", own.text.size() },
        { "text", adapter_mem_hash(own.text.data(), own.text.size() * sizeof(llama_token)) },
    };
}

common_json server_adapter_mem::to_json(int id_slot, const server_prompt & prompt) const {
    llama_adapter_mem_info info;
    if (!llama_model_adapter_mem_info(model(), &info)) {
        return nullptr;
    }

    const auto own = get_own(id_slot, prompt);

    std::vector<float> S(info.n_head * info.n_state * info.rank * info.rank);

    int64_t     n_tokens = 0;
    common_json norms    = common_json::array();
    for (uint32_t i = 0; i < info.n_layer; ++i) {
        n_tokens = llama_model_adapter_mem_get_state(model(), own.values.data(), i, S.data(), nullptr);

        double sum = 0.0;
        for (const float x : S) {
            sum += (double) x * x;
        }
        norms.push_back(std::sqrt(sum));
    }

    auto res = state(own);

    res["current_state"] = n_tokens / info.n_chunk % info.n_state; // the one that the next token is written to
    res["norms"]         = norms;
    res["given"]         = own.is_given;
    res["frozen"]        = own.frozen;
    res["scale"]         = own.scale;
    return res;
}

//
// actions
//

server_task_result_ptr server_adapter_mem::action(const server_task & task, server_prompt & prompt, int n_ctx, bool has_mtmd, const std::function<void()> & clear) {
    const int           id_slot = task.slot_action.id_slot;
    const std::string & action  = task.slot_action.action;

    // held until it is done: what was asked for is taken back before it, or not at all
    auto &                      asker = *task.slot_action.asker;
    std::lock_guard<std::mutex> lock(asker.mutex);

    asker.is_answered = asker.is_gone && !asker.is_gone();
    if (!asker.is_answered) {
        auto res = adapter_mem_busy(id_slot);
        res->id  = task.id;
        return res;
    }

    try {
        if (action.rfind("memory-", 0) == 0 && !has_memory()) {
            throw std::invalid_argument("this server has no memory: start it with --memory-adapter");
        }

        auto & slot = slots[id_slot];

        common_json data;
        if (action == "save") {
            data = save(id_slot, prompt, task);
        } else if (action == "restore") {
            data = restore(id_slot, prompt, task, n_ctx, has_mtmd, clear);
        } else if (action == "erase") {
            data = { { "id_slot", id_slot }, { "n_erased", prompt.tokens.size() } };
            slot = slot_memory();
            clear();
        } else if (action == "forget") {
            data = { { "id_slot", id_slot } };
            clear();
        } else if (action == "memory-save") {
            data = memory_save(id_slot, prompt, task);
        } else if (action == "memory-restore") {
            data = memory_restore(id_slot, task, clear);
        } else if (action == "memory-reset") {
            data = { { "id_slot", id_slot } };
            slot = slot_memory();
            clear();
        } else {
            std::optional<bool>  frozen;
            std::optional<float> scale;
            server_adapter_mem_parse_setting(task.slot_action.data, "memory_adapter", frozen, scale);

            slot.frozen = frozen.value_or(slot.frozen);
            slot.scale  = scale.value_or(slot.scale);

            data = { { "id_slot", id_slot }, { "frozen", slot.frozen }, { "scale", slot.scale } };
        }

        if (action == "save" || action == "memory-save") {
            server_adapter_mem_count(SERVER_ADAPTER_MEM_SAVES);
        } else if (action == "restore" || action == "memory-restore") {
            server_adapter_mem_count(SERVER_ADAPTER_MEM_RESTORES);
        }

        auto res     = std::make_unique<server_task_result_adapter_mem>(std::move(data), false);
        res->id      = task.id;
        res->id_slot = id_slot;
        return res;
    } catch (const adapter_mem_conflict & e) {
        auto res = adapter_mem_failed(e.what(), ERROR_TYPE_INVALID_REQUEST, true);
        res->id  = task.id;
        return res;
    } catch (const std::exception & e) {
        auto res = adapter_mem_failed(e.what(), ERROR_TYPE_INVALID_REQUEST);
        res->id  = task.id;
        return res;
    }
}

common_json server_adapter_mem::save(int id_slot, server_prompt & prompt, const server_task & task) {
    const int64_t t_start = ggml_time_us();

    if (has_memory() && slots[id_slot].is_kept) {
        const auto & slot = slots[id_slot];

        if (slot.text.empty() && prompt.tokens.empty()) {
            llama_adapter_mem_seq_start(ctx, id_slot, slot.origin ? slot.origin->values.data() : nullptr);
        } else if (slot.text != prompt.tokens.get_tokens() || prompt.tokens.key != adapter_mem_key(slot.origin, slot.setting)) {
            throw adapter_mem_conflict(string_format("[slot-text] the text of slot %d is not in it: another request needed the room; memory-save keeps what was learnt", id_slot));
        }
    }

    const std::vector<char> packed = prompt.tokens.serialize();
    GGML_ASSERT(packed.size() % sizeof(llama_token) == 0);

    llama_adapter_mem_state_error_clear();

    const size_t n_bytes = llama_state_seq_save_file(ctx, task.slot_action.filepath.c_str(), id_slot,
            reinterpret_cast<const llama_token *>(packed.data()), packed.size() / sizeof(llama_token));
    if (n_bytes == 0) {
        throw std::runtime_error(adapter_mem_reason(id_slot, "Unable to save slot"));
    }

    return {
        { "id_slot", id_slot },
        { "filename", task.slot_action.filename },
        { "n_saved", prompt.tokens.size() },
        { "n_written", n_bytes },
        { "timings", { { "save_ms", (ggml_time_us() - t_start) / 1000.0 } } },
    };
}

// the tokens of a slot file, as the server packs them
struct adapter_mem_restored {
    const llama_context * ctx;
    size_t                n_ctx;
    bool                  has_mtmd;

    server_tokens tokens;
    std::string   fault;

    bool take(const llama_token * packed, size_t n_packed) {
        try {
            tokens = server_tokens::deserialize({ packed, packed + n_packed }, has_mtmd);
            if (tokens.size() > n_ctx) {
                throw std::runtime_error("Restored prompt does not fit in the slot context");
            }
            if (!tokens.validate(ctx)) {
                throw std::runtime_error("Invalid tokens in slot save file");
            }
        } catch (const std::exception & e) {
            fault = e.what();
        }
        return fault.empty();
    }
};

common_json server_adapter_mem::restore(int id_slot, server_prompt & prompt, const server_task & task, int n_ctx, bool has_mtmd, const std::function<void()> & clear) {
    const int64_t t_start = ggml_time_us();
    const char *  path    = task.slot_action.filepath.c_str();

    adapter_mem_restored restored = { ctx, (size_t) n_ctx, has_mtmd, {}, {} };

    size_t n_bytes = 0;
    if (has_memory()) {
        n_bytes = llama_adapter_mem_seq_load_file(ctx, path, id_slot, [](const llama_token * packed, size_t n_packed, void * user_data) { return static_cast<adapter_mem_restored *>(user_data)->take(packed, n_packed); }, &restored);
    } else {
        llama_adapter_mem_state_error_clear();

        size_t n_packed = 0;
        if (llama_state_seq_load_file(ctx, path, id_slot, nullptr, 0, &n_packed) != 0) {
            llama_tokens packed(std::max<size_t>(1, n_packed));
            n_bytes = llama_state_seq_load_file(ctx, path, id_slot, packed.data(), packed.size(), &n_packed);
            if (n_bytes != 0 && !restored.take(packed.data(), n_packed)) {
                n_bytes = 0;
            }
        }
    }

    if (n_bytes == 0) {
        // a state with a memory is refused before anything is changed, by a base too
        if (!has_memory() && llama_adapter_mem_state_error()[0] == '\0') {
            clear();
        }
        std::string what = adapter_mem_reason(id_slot, restored.fault.empty() ? "No available space in KV cache or invalid slot save file" : "");
        if (!restored.fault.empty()) {
            what += what.empty() ? restored.fault : ": " + restored.fault;
        }
        throw std::runtime_error("Unable to restore slot: " + what);
    }

    prompt.clear();
    prompt.tokens = std::move(restored.tokens);

    if (has_memory()) {
        auto & slot = slots[id_slot];

        slot = slot_memory();

        std::vector<float> origin(n_values);
        if (llama_adapter_mem_seq_get_origin(ctx, id_slot, origin.data())) {
            slot.origin = server_adapter_mem_memory_init(std::move(origin));
        }
        llama_adapter_mem_seq_get(ctx, id_slot, &slot.setting.frozen, &slot.setting.scale);
        slot.setting.lora = llama_adapter_mem_seq_get_tag(ctx, id_slot);
        slot.values       = get_values(id_slot);
        slot.text         = prompt.tokens.get_tokens();
        slot.is_kept      = true;
        slot.is_given     = slot.origin != nullptr;

        prompt.tokens.key = adapter_mem_key(slot.origin, slot.setting);
    }

    return {
        { "id_slot", id_slot },
        { "filename", task.slot_action.filename },
        { "n_restored", prompt.tokens.size() },
        { "n_read", n_bytes },
        { "timings", { { "restore_ms", (ggml_time_us() - t_start) / 1000.0 } } },
    };
}

void server_adapter_mem::check_continues(int id_slot, const slot_memory & own, const common_json & data) {
    if (!data.contains("continues")) {
        return;
    }

    const auto & continues = data.at("continues");
    if (!continues.is_object() || !continues.contains("origin") || !continues.contains("n_text") || !continues.at("n_text").is_number_integer() ||
            !continues.contains("text") || !continues.at("text").is_string() || continues.size() != 3) {
        throw std::invalid_argument("\"continues\" must be {\"origin\": hash or null, \"n_text\": number of tokens, \"text\": hash}");
    }

    if (continues.at("origin") != common_json_value(adapter_mem_sha256(own.origin))) {
        throw adapter_mem_conflict(string_format("[state-continues] the memory of slot %d began on another memory than the one that is to be continued", id_slot));
    }

    const auto & text = own.text;
    const double n    = continues.at("n_text").get<double>();
    if (n < 0 || n > text.size()) {
        throw adapter_mem_conflict(string_format("[state-continues] the text of slot %d has %zu tokens, the one that is to be continued has more", id_slot, text.size()));
    }
    if (continues.at("text").get<std::string>() != adapter_mem_hash(text.data(), (size_t) n * sizeof(llama_token))) {
        throw adapter_mem_conflict(string_format("[state-continues] the text of slot %d does not begin with the one that is to be continued", id_slot));
    }
}

common_json server_adapter_mem::memory_save(int id_slot, const server_prompt & prompt, const server_task & task) const {
    const int64_t t_start = ggml_time_us();

    const auto own = get_own(id_slot, prompt);

    check_continues(id_slot, own, task.slot_action.data);

    auto res = state(own);

    res["id_slot"] = id_slot;
    if (task.slot_action.filename.empty()) {
        res["memory"]  = server_adapter_mem_encode(model(), own.values);
        res["n_bytes"] = llama_model_adapter_mem_write(model(), own.values.data(), nullptr, 0);
    } else {
        const size_t n_bytes = llama_model_adapter_mem_save_file(model(), own.values.data(), task.slot_action.filepath.c_str());
        if (n_bytes == 0) {
            throw std::runtime_error(adapter_mem_reason(id_slot, "the memory cannot be saved: see the log"));
        }
        res["filename"] = task.slot_action.filename;
        res["n_bytes"]  = n_bytes;
    }
    res["timings"] = { { "save_ms", (ggml_time_us() - t_start) / 1000.0 } };
    return res;
}

common_json server_adapter_mem::memory_restore(int id_slot, const server_task & task, const std::function<void()> & clear) {
    const int64_t t_start = ggml_time_us();

    server_adapter_mem_memory_ptr origin;
    if (task.slot_action.filename.empty()) {
        origin = server_adapter_mem_decode(model(), task.slot_action.data.at("memory").get<std::string>());
    } else {
        std::vector<float> values(n_values);
        if (llama_model_adapter_mem_load_file(model(), task.slot_action.filepath.c_str(), values.data()) == 0) {
            throw std::runtime_error(adapter_mem_reason(id_slot, "the memory cannot be restored: see the log"));
        }
        origin = server_adapter_mem_memory_init(std::move(values));
    }

    clear();

    auto & slot = slots[id_slot];

    slot          = slot_memory();
    slot.origin   = origin;
    slot.values   = origin ? origin->values : std::vector<float>(n_values, 0.0f);
    slot.is_kept  = true;
    slot.is_given = true;

    auto res = state(slot);

    res["id_slot"] = id_slot;
    res["n_bytes"] = llama_model_adapter_mem_write(model(), slot.values.data(), nullptr, 0);
    if (!task.slot_action.filename.empty()) {
        res["filename"] = task.slot_action.filename;
    }
    res["timings"] = { { "restore_ms", (ggml_time_us() - t_start) / 1000.0 } };
    return res;
}

//
// HTTP
//

static const double ADAPTER_MEM_TIMEOUT     = 60.0; // seconds
static const double ADAPTER_MEM_TIMEOUT_MAX = 3600.0;

// the body of a slot action, checked as far as it can be without the slot
static common_json adapter_mem_parse_action(const server_http_req & req, const std::string & action, const common_params & params, std::string & filename) {
    auto data = req.body.empty() ? common_json::object() : common_json::parse(req.body);
    if (!data.is_object()) {
        throw std::invalid_argument("the body of a slot action must be a JSON object");
    }

    const bool is_memory = action == "memory-save" || action == "memory-restore";
    const bool is_file   = action == "save" || action == "restore" || (is_memory && data.contains("filename"));

    if (params.slot_save_path.empty() && (is_file || action == "erase") && action.rfind("memory-", 0) != 0) {
        throw std::runtime_error("This server does not support slots action. Start it with `--slot-save-path`");
    }
    if (is_file) {
        if (params.slot_save_path.empty()) {
            throw std::runtime_error("This server keeps no files: start it with `--slot-save-path`, or leave \"filename\" out");
        }
        if (!data.contains("filename") || !data.at("filename").is_string() || !fs_validate_filename(data.at("filename").get<std::string>())) {
            throw std::invalid_argument("Invalid filename");
        }
        filename = data.at("filename").get<std::string>();
    } else if (action == "memory-save" && (!data.contains("return_memory") || data.at("return_memory") != common_json_value(true))) {
        throw std::invalid_argument("memory-save needs \"filename\", or \"return_memory\": true");
    } else if (action == "memory-restore" && (!data.contains("memory") || !data.at("memory").is_string())) {
        throw std::invalid_argument("memory-restore needs \"filename\", or \"memory\": base64 of a memory-only state file");
    }
    return data;
}

static double adapter_mem_parse_timeout(common_json & data) {
    if (!data.contains("timeout")) {
        return ADAPTER_MEM_TIMEOUT;
    }
    const auto value = data.at("timeout");
    if (!value.is_number() || !(value.get<double>() >= 0 && value.get<double>() <= ADAPTER_MEM_TIMEOUT_MAX)) {
        throw std::invalid_argument("\"timeout\" must be seconds, from 0 to 3600");
    }
    data.erase("timeout");
    return value.get<double>();
}

// A page in somebody's browser can send such a request without being allowed to read the answer: what it may read is what it may
// do. Only asked where the server says that pages of this machine alone are let in.
static bool adapter_mem_is_stranger(const server_http_req & req, const common_params & params) {
    const auto it = std::find_if(req.headers.begin(), req.headers.end(), [](const auto & header) {
        return header.first == "Origin" || header.first == "origin";
    });
    if (params.cors_origins != "localhost" || it == req.headers.end() || it->second.empty()) {
        return false;
    }

    const size_t      i    = it->second.find("://");
    const std::string host = i == std::string::npos ? "" : it->second.substr(i + 3);
    for (const char * own : { "localhost", "127.0.0.1", "[::1]" }) {
        const std::string name = own;
        if (host == name || host.rfind(name + ":", 0) == 0) {
            return false;
        }
    }
    return true;
}

server_task_result_ptr server_adapter_mem_post_action(server_response_reader & rd, const server_http_req & req, const common_params & params) {
    static const char * const actions[] = { "save", "restore", "erase", "forget", "memory-save", "memory-restore", "memory-reset", "memory-set" };

    const std::string action = req.get_param("action");
    if (std::find(std::begin(actions), std::end(actions), action) == std::end(actions)) {
        return adapter_mem_failed("Invalid action", ERROR_TYPE_INVALID_REQUEST);
    }
    if (adapter_mem_is_stranger(req, params)) {
        return adapter_mem_failed("slots are for pages of this machine alone: --cors-origins lets others in", ERROR_TYPE_PERMISSION);
    }

    server_task task(SERVER_TASK_TYPE_SLOT_ADAPTER_MEM);
    double      timeout = ADAPTER_MEM_TIMEOUT;
    try {
        const auto id_slot = common_json::parse_no_throw(req.get_param("id_slot"));

        task.id_slot              = server_adapter_mem_parse_slot(id_slot.is_discarded() ? common_json(nullptr) : id_slot, params.n_parallel);
        task.slot_action.id_slot  = task.id_slot;
        task.slot_action.action   = action;
        task.slot_action.data     = adapter_mem_parse_action(req, action, params, task.slot_action.filename);
        task.slot_action.filepath = params.slot_save_path + task.slot_action.filename;

        timeout = adapter_mem_parse_timeout(task.slot_action.data);
    } catch (const std::invalid_argument & e) {
        return adapter_mem_failed(e.what(), ERROR_TYPE_INVALID_REQUEST);
    } catch (const common_json_error & e) {
        return adapter_mem_failed(e.what(), ERROR_TYPE_INVALID_REQUEST);
    } catch (const std::exception & e) {
        return adapter_mem_failed(e.what(), ERROR_TYPE_NOT_SUPPORTED);
    }

    const int     id_slot = task.id_slot;
    const int64_t t_end   = ggml_time_us() + (int64_t) (timeout * 1e6);

    // a client that hangs up, or waits no longer, takes back what it asked for
    const auto is_gone = [&]() {
        return req.should_stop() || ggml_time_us() > t_end;
    };
    const auto asker       = std::make_shared<server_adapter_mem_asker>();
    asker->is_gone         = is_gone;
    task.slot_action.asker = asker;

    task.id = rd.get_new_id();
    rd.post_task(std::move(task));

    auto res = rd.next(is_gone);
    {
        std::lock_guard<std::mutex> lock(asker->mutex);
        asker->is_gone = nullptr;
    }
    if (!res && asker->is_answered) {
        res = rd.next([]() { return false; }); // it was done meanwhile
    }
    if (!res) {
        rd.stop();
        return adapter_mem_busy(id_slot);
    }
    return res;
}
