#pragma once

#include "server-http.h"

// Calls a handler, unless the body is nested deeper than a request has reason to be, which is a 400: to copy, print or compare
// what is parsed from it takes a stack of that depth, and the process ends where a thread's stack does.
server_http_res_ptr server_json_depth_limit(const server_http_context::handler_t & handler, const server_http_req & req);
