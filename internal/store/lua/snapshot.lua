-- snapshot.lua: reads a room's position and, if the room is small, its members in the
-- same moment.
--
-- KEYS[1] members  KEYS[2] seq
-- ARGV[1] maximum number of members of a small room
-- Reply: {position or '', number of members, {conn, record, ...} or {}, now}

local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)
local p = redis.call('GET', KEYS[2])
local total = redis.call('HLEN', KEYS[1])
local all = {}
if total <= tonumber(ARGV[1]) then
  all = redis.call('HGETALL', KEYS[1])
end
return { p or '', total, all, string.format('%.0f', now) }
