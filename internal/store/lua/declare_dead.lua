-- declare_dead.lua: moves the caller's own incarnation to the list of dead servers.
--
-- KEYS[1] live servers  KEYS[2] dead servers
-- ARGV[1] incarnation

local clock = redis.call('TIME')
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('ZADD', KEYS[2], 'NX', string.format('%.0f', tonumber(clock[1]) * 1000), ARGV[1])
return 1
