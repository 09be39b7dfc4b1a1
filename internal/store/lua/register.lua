-- register.lua: adds a new incarnation to the list of live servers.
--
-- KEYS[1] live servers  KEYS[2] name of the incarnation
-- ARGV[1] incarnation  ARGV[2] lease (ms)  ARGV[3] name for people, or ''  ARGV[4] life of the name (ms)
-- Reply: now

local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)
redis.call('ZADD', KEYS[1], string.format('%.0f', now + tonumber(ARGV[2])), ARGV[1])
if ARGV[3] ~= '' then
  redis.call('SET', KEYS[2], ARGV[3], 'PX', ARGV[4])
end
return string.format('%.0f', now)
