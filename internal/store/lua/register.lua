-- register.lua: puts a new incarnation on the list.
--
-- KEYS[1] instances
-- ARGV[1] incarnation  ARGV[2] lease (ms)
-- Reply: now

local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)
redis.call('ZADD', KEYS[1], string.format('%.0f', now + tonumber(ARGV[2])), ARGV[1])
return string.format('%.0f', now)
