-- declare_dead.lua: moves the caller's own incarnation to the list of dead servers, and
-- puts one that is being cleaned up after back on it. An incarnation of which nothing is
-- left does not go back: this call may have waited in a proxy, and perhaps no server
-- runs that could take it off again.
--
-- KEYS[1] live servers  KEYS[2] dead servers  KEYS[3] fence of the incarnation in bucket 0
-- ARGV[1] incarnation

local clock = redis.call('TIME')
redis.call('ZREM', KEYS[1], ARGV[1])
if redis.pcall('GET', KEYS[3]) == 'gone' then
  return 0
end
redis.call('ZADD', KEYS[2], 'NX', string.format('%.0f', tonumber(clock[1]) * 1000), ARGV[1])
return 1
