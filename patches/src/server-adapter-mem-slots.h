#pragma once

// The memories of the server's slots.
//
// A slot's own memory is what an action gave it and what requests that name the slot made of it since. It is kept here, apart
// from the sequence: whatever else runs in the slot, clears it to make room or puts the server to sleep takes nothing from it.
// It is f(origin, setting, text) as at the end of the last request that named the slot.

#include "server-queue.h"
#include "server-adapter-mem.h"
#include "server-task.h"

#include <functional>

struct server_http_req;

class server_adapter_mem {
public:
    // after each load of the model: the slots' own memories stay
    void init(llama_context * ctx, int n_slots);

    bool has_memory() const { return n_values > 0; }

    // Before a slot is chosen: what the task and its children run on, and the key of their tokens.
    void prepare(server_task & task, const std::vector<common_adapter_lora_info> & lora) const;

    // Before the task runs in a slot: what of the slot's text may serve it stays, and it has the task's origin and setting.
    void begin(int id_slot, server_prompt & prompt, const server_task & task);

    // At the end of the text: why it has to end with an error, "" if not.
    std::string check(int id_slot) const;

    // what became of the memory, for the answer; null if the request does not ask
    common_json result(int id_slot, const server_task & task, int n_reused) const;

    // the task leaves the slot, for which so many tokens were computed
    void end(int id_slot, const server_prompt & prompt, const server_task & task, uint64_t n_computed);

    // a slot with a memory of its own is the last that others get
    bool is_kept(int id_slot) const { return has_memory() && slots[id_slot].is_kept; }

    // for /slots; no decode may be running
    common_json to_json(int id_slot, const server_prompt & prompt) const;

    // POST /slots/{id}?action=..., all actions of a server with or without a memory. clear: of the slot, text and sequence.
    server_task_result_ptr action(const server_task & task, server_prompt & prompt, int n_ctx, bool has_mtmd, const std::function<void()> & clear);

private:
    struct slot_memory {
        bool is_kept = false; // else the slot was not named yet: what it shows and saves is the text that happens to be in it

        bool is_given = false; // by an action, be it an empty one

        server_adapter_mem_memory_ptr origin;
        std::vector<float>            values; // after the text
        llama_tokens                  text;
        server_adapter_mem_setting    setting; // under which the text was computed

        bool  frozen = false; // memory-set
        float scale  = 1.0f;

        bool is_running = false; // a request that names the slot
    };

    llama_context * ctx      = nullptr;
    size_t          n_values = 0;

    std::vector<slot_memory> slots;

    const llama_model * model() const { return llama_get_model(ctx); }

    std::vector<float> get_values(int id_slot) const;

    // the slot's own memory now, and the text that it is of
    slot_memory get_own(int id_slot, const server_prompt & prompt) const;

    common_json state(const slot_memory & own) const;

    static void check_continues(int id_slot, const slot_memory & own, const common_json & data);

    common_json save(int id_slot, server_prompt & prompt, const server_task & task);
    common_json restore(int id_slot, server_prompt & prompt, const server_task & task, int n_ctx, bool has_mtmd, const std::function<void()> & clear);
    common_json memory_save(int id_slot, const server_prompt & prompt, const server_task & task) const;
    common_json memory_restore(int id_slot, const server_task & task, const std::function<void()> & clear);
};

// The HTTP side of a slot action: checks the request, waits for the slot, returns the answer or an error.
server_task_result_ptr server_adapter_mem_post_action(server_response_reader & rd, const server_http_req & req, const common_params & params);
