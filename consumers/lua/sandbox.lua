--[[ The trusted half of the sandbox: builds a message's tables, runs the user's text on them, writes the result as JSON.

Loaded once by `sandbox.py`, which passes the libraries and limits in and takes `compile`, `run`, `feed` and `shape` out. The
user's text sees nothing of this file: its environment is made anew for every message and holds only what `base` lists.

A message arrives flat, as arguments: scalars as they are, nil for JSON null, and before each object or list a marker table
that says what follows (see `take`).
]]
local limits = ...

local type, next, error, select, rawequal, rawlen = type, next, error, select, rawequal, rawlen
local tostring, tonumber, pcall, xpcall, load = tostring, tonumber, pcall, xpcall, load
local setmetatable, getmetatable = setmetatable, getmetatable
local getinfo, sethook, setupvalue = debug.getinfo, debug.sethook, debug.setupvalue
local clock, collectgarbage = os.clock, collectgarbage
local format, find, gsub, match, gmatch = string.format, string.find, string.gsub, string.match, string.gmatch
local rep, sub = string.rep, string.sub
local concat, sort, unpack = table.concat, table.sort, table.unpack
local utf8_len, math_type, huge = utf8.len, math.type, math.huge

local CHUNK = "=transform"
local CPU_S, WRITE_S, OUTPUT_BYTES, DEPTH = limits.cpu_s, limits.write_s, limits.output_bytes, limits.depth
local TOO_LONG = format("took longer than %d ms CPU", CPU_S * 1000)
local WRITING_TOO_LONG = format("the result took longer than %d ms CPU to write", WRITE_S * 1000)
local HOOK_EVERY = 1000 -- VM instructions, some 5 µs
local LARGE = 4096 -- bytes or elements; a C function given more looks at the clock first
local LARGEST_REP = 16 * 1024 * 1024
local NO_MEMORY = "not enough memory"

-- Faults: errors of ours, with the line of the user's text they are laid to. --------------------------------------------

local FAULT = {}

local function fault(message, line)
  return setmetatable({message = message, line = line}, FAULT)
end

local function user_line()
  for level = 2, 1000000 do
    local info = getinfo(level, "Sl")
    if not info then return nil end
    if info.source == CHUNK then return info.currentline end
  end
end

-- CPU time. The clock is read first when the hook first fires, so that a short message costs nothing. --------------------

local running = false
local started, spent, writing

-- Raises once; `kept` sees to it that no pcall holds it back.
local function look_at_clock()
  if not running then return end
  local now = clock()
  if not started then
    started = now
  elseif now - started > (writing and WRITE_S or CPU_S) then
    running = false
    spent = fault(writing and WRITING_TOO_LONG or TOO_LONG, user_line())
    error(spent, 0)
  end
end

-- null, numbers beyond a double, arrays, objects with a known order. -----------------------------------------------------

local null = {}
local function read_only() error("attempt to write into null", 2) end
setmetatable(null, {__name = "null", __tostring = function() return "null" end, __newindex = read_only})

local DIGITS = {__name = "number"}
local digits_of = setmetatable({}, {__mode = "k"}) -- not in the value itself, where the text could change them
local function double(value)
  if type(value) == "table" and getmetatable(value) == DIGITS then return tonumber(digits_of[value]) + 0.0 end
  return value
end
DIGITS.__tostring = function(a) return digits_of[a] end
DIGITS.__concat = function(a, b)
  return (digits_of[a] or a) .. (digits_of[b] or b)
end
DIGITS.__eq = function(a, b) return digits_of[a] ~= nil and digits_of[a] == digits_of[b] end
DIGITS.__lt = function(a, b) return double(a) < double(b) end
DIGITS.__le = function(a, b) return double(a) <= double(b) end
DIGITS.__unm = function(a) return -double(a) end
DIGITS.__add = function(a, b) return double(a) + double(b) end
DIGITS.__sub = function(a, b) return double(a) - double(b) end
DIGITS.__mul = function(a, b) return double(a) * double(b) end
DIGITS.__div = function(a, b) return double(a) / double(b) end
DIGITS.__mod = function(a, b) return double(a) % double(b) end
DIGITS.__pow = function(a, b) return double(a) ^ double(b) end
DIGITS.__idiv = function(a, b) return double(a) // double(b) end
DIGITS.__newindex = function() error("attempt to index a number value", 2) end

local ARRAY = {}

local OBJECT_ORDER = "order" -- in a metatable: the object's keys in the order of the JSON text
local MAKE_AT_ONCE = 100 -- an object of at most so many keys gets a constructor of its own

local function constructor(keys)
  if #keys > MAKE_AT_ONCE or #keys == 0 then return nil end
  local names, fields = {}, {}
  for i = 1, #keys do
    names[i] = "v" .. i
    fields[i] = format("[%q]=v%d==nil and null or v%d", keys[i], i, i)
  end
  local text = "local null=... return function(" .. concat(names, ",") .. ") return {" .. concat(fields, ",") .. "} end"
  return load(text, "=(sandbox)", "t", {})(null)
end

local json_text

-- What `sandbox.py` keeps for each set of keys: a marker for an object of scalars, one for an object with more inside.
local function shape(keys)
  local order = {[OBJECT_ORDER] = keys}
  local flat = {keys = keys, order = order, make = constructor(keys)}
  return flat, {keys = keys, order = order, make = flat.make, mixed = true}
end

local LIST, MIXED_LIST, BIG = {}, {}, {} -- markers: LIST count values…; BIG digits

local args, at
local fed, fed_count = {}, 0 -- a message of too many values for one call comes in parts

local function feed(...)
  local count = select("#", ...)
  local values = {...}
  for i = 1, count do fed[fed_count + i] = values[i] end
  fed_count = fed_count + count
end

-- The next value of the message.
local function take()
  at = at + 1
  local value = args[at]
  if type(value) ~= "table" then
    if value == nil then return null end
    return value
  end
  if value == LIST or value == MIXED_LIST then
    at = at + 1
    local count, list = args[at], {}
    if value == LIST then
      for i = 1, count do
        local item = args[at + i]
        if item == nil then item = null end
        list[i] = item
      end
      at = at + count
    else
      for i = 1, count do list[i] = take() end
    end
    return setmetatable(list, ARRAY)
  end
  if value == BIG then
    at = at + 1
    local big = setmetatable({}, DIGITS)
    digits_of[big] = args[at]
    return big
  end
  local keys, object = value.keys, nil
  local count = #keys
  if value.mixed then
    object = {}
    for i = 1, count do object[keys[i]] = take() end
  elseif value.make then
    object = value.make(unpack(args, at + 1, at + count))
    at = at + count
  else
    object = {}
    for i = 1, count do
      local item = args[at + i]
      if item == nil then item = null end
      object[keys[i]] = item
    end
    at = at + count
  end
  return setmetatable(object, value.order)
end

-- JSON out. --------------------------------------------------------------------------------------------------------------

local ESCAPES = {['"'] = '\\"', ["\\"] = "\\\\", ["\b"] = "\\b", ["\f"] = "\\f", ["\n"] = "\\n", ["\r"] = "\\r", ["\t"] = "\\t"}
for code = 0, 31 do
  local char = string.char(code)
  ESCAPES[char] = ESCAPES[char] or format("\\u%04x", code)
end

function json_text(value)
  if find(value, '[\0-\31"\\]') then value = gsub(value, '[\0-\31"\\]', ESCAPES) end
  return '"' .. value .. '"'
end

local function shortest(value)
  local text = format("%.15g", value)
  if tonumber(text) ~= value then
    text = format("%.16g", value)
    if tonumber(text) ~= value then text = format("%.17g", value) end
  end
  if not find(text, "[.en]") then text = text .. ".0" end
  return text
end

local out, length, size = {}, 0, 0
local path = {}

local function refuse(message, depth, key)
  local names = {"result"}
  for i = 1, depth - 1 do names[i + 1] = path[i] end
  if key ~= nil then names[#names + 1] = key end
  for i = 2, #names do
    local name = names[i]
    names[i] = math_type(name) and "[" .. tostring(name) .. "]" or "." .. sub(tostring(name), 1, 100)
  end
  if #names > 12 then names = {unpack(names, 1, 10)}; names[11] = "…" end
  error(fault(concat(names) .. ": " .. message), 0)
end

local function too_large()
  error(fault(format("the result is larger than %d bytes", OUTPUT_BYTES)), 0)
end

local write_table

-- A value that is not a plain string or integer; those the callers write themselves.
local function write(value, depth, key)
  local kind = type(value)
  local text
  if kind == "string" then
    text = json_text(value)
  elseif kind == "table" then
    local tag = getmetatable(value)
    if tag == DIGITS then
      text = digits_of[value]
    elseif rawequal(value, null) then
      text = "null"
    else
      path[depth] = key
      return write_table(value, tag, depth + 1)
    end
  elseif kind == "number" then
    if math_type(value) == "integer" then
      text = value .. ""
    else
      if value ~= value or value == huge or value == -huge then
        refuse((value ~= value and "NaN" or "Infinity") .. " is no JSON number", depth, key)
      end
      text = shortest(value)
    end
  elseif kind == "boolean" then
    text = value and "true" or "false"
  else
    refuse("a " .. kind .. " is no JSON value", depth, key)
  end
  size = size + #text
  if size > OUTPUT_BYTES then too_large() end
  length = length + 1
  out[length] = text
end

local key_texts, keys_known = {}, 0
local KEYS_KNOWN, KEY_BYTES = 5000, 100 -- how many are kept, and how long ones

-- `,"key":`
local function key_text(key)
  local text = "," .. json_text(key) .. ":"
  if #key > KEY_BYTES then return text end
  keys_known = keys_known + 1
  if keys_known > KEYS_KNOWN then key_texts, keys_known = {}, 1 end
  key_texts[key] = text
  return text
end

local function write_members(object, keys, depth)
  local count = 0
  for i = 1, #keys do
    local key = keys[i]
    local value = object[key]
    if value ~= nil then
      local text = key_texts[key] or key_text(key)
      size = size + #text
      count = count + 1
      length = length + 1
      if out[length - 1] == "{" then text = sub(text, 2) end
      out[length] = text
      local kind = type(value)
      if kind == "string" then
        if find(value, '[\0-\31"\\]') then value = gsub(value, '[\0-\31"\\]', ESCAPES) end
        length = length + 1
        out[length] = '"' .. value .. '"'
        size = size + #value
      elseif math_type(value) == "integer" then
        length = length + 1
        out[length] = value
        size = size + 1
      elseif rawequal(value, null) then
        length = length + 1
        out[length] = "null"
        size = size + 4
      else
        write(value, depth, key)
      end
    end
  end
  if size > OUTPUT_BYTES then too_large() end
  return count
end

local function write_array(list, count, depth)
  if count > OUTPUT_BYTES then too_large() end
  length = length + 1
  out[length] = "["
  for i = 1, count do
    if i > 1 then
      length = length + 1
      out[length] = ","
      size = size + 1
    end
    local value = list[i]
    if value == nil then value = null end
    write(value, depth, i)
  end
  length = length + 1
  out[length] = "]"
end

local KEYS = "keys must all be strings (an object) or the integers 1, 2, 3 … (an array)"

local function sorted_keys(object, known, depth)
  local keys, count = {}, 0
  for key in next, object do
    if type(key) ~= "string" then refuse(KEYS, depth) end
    if not known or not known[key] then
      count = count + 1
      keys[count] = key
    end
  end
  sort(keys)
  return keys
end

local function highest_index(list, depth)
  local highest, count = 0, 0
  for key in next, list do
    if math_type(key) ~= "integer" or key < 1 then refuse(KEYS, depth) end
    if key > highest then highest = key end
    count = count + 1
  end
  return highest, count
end

function write_table(value, tag, depth)
  if depth > DEPTH then error(fault("the result contains itself or is more than " .. DEPTH .. " levels deep"), 0) end
  size = size + 2
  if tag == ARRAY then return write_array(value, highest_index(value, depth), depth) end
  local order = tag and tag[OBJECT_ORDER]
  if tag and not order then refuse("a library is no JSON value", depth) end
  if not order then
    local first = next(value)
    if math_type(first) == "integer" then
      local highest, count = highest_index(value, depth)
      if highest ~= count then refuse("a list with holes; array{…} makes them null", depth) end
      return write_array(value, count, depth)
    end
  end
  length = length + 1
  out[length] = "{"
  if order then
    local count = write_members(value, order, depth)
    for _ in next, value do count = count - 1 end
    if count < 0 then
      local known = {}
      for i = 1, #order do known[order[i]] = true end
      write_members(value, sorted_keys(value, known, depth), depth)
    end
  else
    write_members(value, sorted_keys(value, nil, depth), depth)
  end
  length = length + 1
  out[length] = "}"
end

-- UTF-8 as JSON wants it. A lone surrogate that came as \ud800 goes out so again.
local function checked(text)
  if not utf8_len(text) then
    text = gsub(text, "\xED([\xA0-\xBF])([\x80-\xBF])", function(high, low)
      return format("\\u%04x", 0xD000 | (high:byte() & 0x3F) << 6 | low:byte() & 0x3F)
    end)
    if not utf8_len(text) then error(fault("the result is not valid UTF-8"), 0) end
  end
  if #text > OUTPUT_BYTES then too_large() end
  return text
end

local function to_json(value)
  length, size = 0, 0
  write(value, 0)
  return checked(length == 1 and out[1] or concat(out, "", 1, length))
end

-- What the user's text sees. -----------------------------------------------------------------------------------------------

local function careful(value)
  if type(value) == "string" and #value > LARGE then look_at_clock() end
end

local function on_text(name, of)
  local f = of[name]
  return function(value, ...)
    if type(value) == "string" and #value > LARGE then look_at_clock() end
    return f(value, ...)
  end
end

local function on_number(name)
  local f = math[name]
  return function(a, ...)
    if type(a) == "table" then a = double(a) end
    return f(a, ...)
  end
end

local function extreme(name)
  local f = math[name]
  return function(...)
    local numbers = {...}
    for i = 1, #numbers do numbers[i] = double(numbers[i]) end
    return f(unpack(numbers))
  end
end

local function own_tostring(...)
  if select("#", ...) == 0 then return tostring() end
  local value = ...
  local kind = type(value)
  if kind == "number" then return math_type(value) == "float" and value == value and value ~= huge and value ~= -huge
    and shortest(value) or tostring(value) end
  if kind == "function" then return kind end -- no addresses
  if kind == "table" then
    local tag = getmetatable(value)
    return tag and tag.__tostring and tag.__tostring(value) or kind
  end
  return tostring(value)
end

local function own_type(...)
  local value = ...
  if type(value) == "table" then
    local tag = getmetatable(value)
    if tag == DIGITS then return "number" end
    if rawequal(value, null) then return "null" end
    return "table"
  end
  return type(...)
end

local function own_format(text, ...)
  if type(text) ~= "string" then return format(text, ...) end
  careful(text)
  if find(text, "%%[^%a%%]*p") then error("invalid conversion '%p' to 'format'", 2) end
  local values = {...}
  local number = 0
  for spec in gmatch(text, "%%[^%a%%]*([%a%%])") do
    if spec ~= "%" then
      number = number + 1
      local kind = math_type(values[number]) or type(values[number])
      if kind == "float" and spec == "s" then
        values[number] = own_tostring(values[number])
      elseif kind == "table" or kind == "function" then
        values[number] = (spec == "s" or spec == "q") and own_tostring(values[number]) or double(values[number])
      end
    end
  end
  return format(text, unpack(values, 1, select("#", ...)))
end

local function own_rep(text, count, separator)
  if type(text) == "string" and math_type(count) and count > 0 then
    local width = #text + (type(separator) == "string" and #separator or 0)
    if width * (count + 0.0) > LARGEST_REP then error("the resulting string is too large", 2) end
    if width * count > LARGE then look_at_clock() end
  end
  return rep(text, count, separator)
end

-- A limit that was passed is not to be caught.
local function kept(ok, ...)
  if not ok then
    local problem = ...
    if spent then error(spent, 0) end
    if problem == NO_MEMORY or getmetatable(problem) == FAULT then error(problem, 0) end
  end
  return ok, ...
end

local function own_pcall(...)
  return kept(pcall(...))
end

local function own_error(message, level)
  if type(level) ~= "number" then level = 1 end
  error(message, level > 0 and level + 1 or 0)
end

local function ascending(a, b) return a < b end

local function own_sort(list, before)
  -- The comparison in Lua lets the clock be looked at meanwhile.
  if before == nil and type(list) == "table" and rawlen(list) > LARGE then before = ascending end
  sort(list, before)
end

local insert, remove, move = table.insert, table.remove, table.move

local function own_insert(...)
  if select("#", ...) > 2 then look_at_clock() end
  return insert(...)
end

local function own_remove(...)
  if select("#", ...) > 1 then look_at_clock() end
  return remove(...)
end

local function own_move(list, from, to, ...)
  look_at_clock()
  if math_type(from) and math_type(to) and to - from > 10 * LARGE * LARGE then error("too many elements to move", 2) end
  return move(list, from, to, ...)
end

local function own_concat(...)
  look_at_clock()
  return concat(...)
end

local function own_unpack(...)
  look_at_clock()
  return unpack(...)
end

local function step(list, i)
  i = i + 1
  local value = list[i]
  if value ~= nil then return i, value end
end

local function own_ipairs(list)
  if type(list) ~= "table" then error("bad argument #1 to 'ipairs' (table expected, got " .. type(list) .. ")", 2) end
  return step, list, 0
end

local function own_pairs(list)
  if type(list) ~= "table" or getmetatable(list) == DIGITS then
    error("bad argument #1 to 'pairs' (table expected, got " .. own_type(list) .. ")", 2)
  end
  return next, list, nil
end

local function array(list)
  if list == nil then list = {} end
  local tag = type(list) == "table" and getmetatable(list)
  if type(list) ~= "table" or tag and tag ~= ARRAY and not tag[OBJECT_ORDER] then
    error("array{…} takes a table, got a " .. own_type(list), 2)
  end
  return setmetatable(list, ARRAY)
end

local function frozen(library)
  local message = "the libraries cannot be changed"
  return setmetatable({}, {__index = library, __newindex = function() error(message, 2) end})
end

local text_library = {byte = string.byte, char = string.char, len = string.len, sub = sub, format = own_format, rep = own_rep}
for _, name in next, {"find", "gmatch", "gsub", "match", "lower", "upper", "reverse"} do
  text_library[name] = on_text(name, string)
end
getmetatable("").__index = text_library

local number_library = {pi = math.pi, huge = huge, maxinteger = math.maxinteger, mininteger = math.mininteger,
  random = math.random, max = extreme("max"), min = extreme("min"),
  type = function(...) return (type((...)) == "table" and getmetatable((...)) == DIGITS) and "float" or math_type(...) end}
for _, name in next, {"abs", "ceil", "floor", "sqrt", "fmod", "modf", "exp", "log", "sin", "cos", "tan", "asin", "acos", "atan",
    "tointeger", "ult", "deg", "rad"} do
  number_library[name] = on_number(name)
end

local utf8_library = {char = utf8.char, charpattern = utf8.charpattern}
for _, name in next, {"codes", "codepoint", "len", "offset"} do utf8_library[name] = on_text(name, utf8) end

local base = {
  _VERSION = _VERSION, null = null, array = array, assert = assert, error = own_error, ipairs = own_ipairs, next = next,
  pairs = own_pairs, pcall = own_pcall, select = select, tostring = own_tostring, type = own_type,
  tonumber = function(value, ...)
    if type(value) == "table" then value = double(value) end
    return tonumber(value, ...)
  end,
  string = frozen(text_library), math = frozen(number_library), utf8 = frozen(utf8_library),
  table = frozen({concat = own_concat, insert = own_insert, move = own_move, pack = table.pack, remove = own_remove,
    sort = own_sort, unpack = own_unpack}),
  os = frozen({clock = os.clock, date = os.date, difftime = os.difftime, time = os.time}),
}
local ENVIRONMENT = {__index = base}

-- Nothing else stays within reach, whatever way is found to the real globals.
local loaded = package.loaded
for _, name in next, {"io", "os", "debug", "package", "coroutine", "_G"} do loaded[name] = nil end
local globals = _G
for name in next, globals do globals[name] = nil end

-- Running. -----------------------------------------------------------------------------------------------------------------

local chunk

-- Everything the text does happens in a fresh environment: what it keeps in globals or locals is gone with the message.
local function prepared()
  local environment = setmetatable({}, ENVIRONMENT)
  environment._G = environment
  setupvalue(chunk, 1, environment)
  chunk()
  local transform = environment.transform
  if type(transform) ~= "function" then error(fault("the text defines no function named transform", 1), 0) end
  return transform
end

local function on_message()
  local action, record, changes, metadata = take(), take(), take(), take()
  args = nil
  running = true
  local transform = prepared()
  local result = transform(action, record, changes, metadata)
  started, writing = nil, true
  local text = result ~= nil and to_json(result) or nil
  running = false
  return text
end

local function handler(problem)
  running = false
  if getmetatable(problem) == FAULT then return problem end
  if type(problem) ~= "string" then
    return fault("error(…) with " .. (problem == nil and "nil" or "a " .. type(problem) .. " value"), user_line())
  end
  local line, message = match(problem, "^transform:(%d+): (.*)$")
  if not line then message = gsub(problem, "^%(sandbox%):%d+: ", "") end
  return fault(sub(message, 1, 2000), tonumber(line) or user_line())
end

local DROPPED, PAYLOAD, FAILED = 0, 1, 2

local function ended(ok, result)
  running = false
  if ok then
    if result == nil then return DROPPED end
    return PAYLOAD, result
  end
  out, path, args = {}, {}, nil
  if getmetatable(result) == FAULT then
    local message = result.message
    if not utf8_len(message) then message = gsub(message, "[\x80-\xFF]", "?") end
    return FAILED, message, result.line or false
  end
  return FAILED, result or "error", false
end

local function begin()
  started, spent, writing = nil, nil, false
end

-- Where memory ran out is not told by the error, so the message runs once more, noting lines.
local function run_noting_lines(again)
  local line
  sethook(function(_, number)
    if getinfo(2, "S").source == CHUNK then
      line = number
      look_at_clock()
    end
  end, "l")
  begin()
  local ok = xpcall(again, handler)
  running = false
  sethook(look_at_clock, "", HOOK_EVERY)
  return not ok and line or false
end

local function explained(again, code, message, line)
  if code == FAILED and message == NO_MEMORY then
    collectgarbage()
    line = run_noting_lines(again)
    out, path, args = {}, {}, nil
    collectgarbage()
    message = "needs more than " .. limits.memory_mib .. " MiB of memory"
  end
  return code, message, line
end

local function run(...)
  begin()
  if fed_count > 0 then
    args, fed, fed_count = fed, {}, 0
  else
    args = {...}
  end
  at = 0
  local values = args
  local code, message, line = ended(xpcall(on_message, handler))
  if code ~= FAILED or message ~= NO_MEMORY then return code, message, line end
  return explained(function()
    args, at = values, 0
    return on_message()
  end, code, message, line)
end

local function compile(text)
  local compiled, problem = load(text, CHUNK, "t", {})
  if not compiled then
    local refused = handler(problem)
    refused.line = refused.line or 1
    return ended(false, refused)
  end
  chunk = compiled
  begin()
  local function once()
    running = true
    prepared()
    running = false
  end
  return explained(once, ended(xpcall(once, handler)))
end

-- After an error that was raised outside of every xpcall.
local function recover()
  running = false
  args, fed, fed_count, out, path = nil, {}, 0, {}, {}
  sethook(look_at_clock, "", HOOK_EVERY)
  collectgarbage()
end

recover()
return {compile = compile, run = run, recover = recover, feed = feed, shape = shape, LIST = LIST, MIXED_LIST = MIXED_LIST, BIG = BIG}
