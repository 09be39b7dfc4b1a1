-- rights.lua: runs each command that the other scripts and calls need once, on an
-- unused key and unused channels. It leaves nothing behind, or a string with a life of
-- one second if DEL is refused.
--
-- KEYS[1] the key; further keys are only named
-- ARGV[1], ARGV[2] the channels
-- Reply: per failed command its name, a space, and the error

local reply = {}
local function try(...)
  local v = redis.pcall(...)
  if type(v) == 'table' and v.err then
    reply[#reply + 1] = select(1, ...) .. ' ' .. v.err
  end
end

local k = KEYS[1]
try('TIME')
try('SET', k, '', 'PX', 1000)
try('GET', k)
try('MGET', k)
try('MSET', k, '')
try('PEXPIRE', k, 1000)
try('EXISTS', k)
try('TYPE', k)
try('DEL', k)
try('HSET', k, 'a', 1)
try('HSETNX', k, 'a', 1)
try('HGET', k, 'a')
try('HMGET', k, 'a')
try('HLEN', k)
try('HGETALL', k)
try('HSCAN', k, 0)
try('HDEL', k, 'a')
try('SADD', k, 'a')
try('SCARD', k)
try('SMISMEMBER', k, 'a')
try('SSCAN', k, 0)
try('SREM', k, 'a')
try('ZADD', k, 1, 'a')
try('ZSCORE', k, 'a')
try('ZRANGE', k, 0, 0)
try('ZREM', k, 'a')
redis.pcall('DEL', k)
try('PUBLISH', ARGV[1], '')
try('PUBLISH', ARGV[2], '')
return reply
