-- declare.lua: an incarnation that has ended by its own word joins the dead, to be cleaned up after.
--
-- KEYS[1] instances  KEYS[2] dead
-- ARGV[1] incarnation

local clock = redis.call('TIME')
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('ZADD', KEYS[2], 'NX', string.format('%.0f', tonumber(clock[1]) * 1000), ARGV[1])
return 1
