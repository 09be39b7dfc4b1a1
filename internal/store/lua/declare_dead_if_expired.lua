-- declare_dead_if_expired.lua: declares an incarnation dead if its lease has run out.
-- This is the only moment of death of a server that does not end by itself. The list of
-- dead servers holds the end of its lease, from which the grace of its entries counts.
--
-- KEYS[1] live servers  KEYS[2] dead servers
-- ARGV[1] incarnation  ARGV[2] expected time of this Redis (unix ms)  ARGV[3] tolerance (ms)
-- Reply: 'CLOCK', '1' declared dead by this call, '0' not expired or not live

local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)
if math.abs(now - tonumber(ARGV[2])) > tonumber(ARGV[3]) then
  return 'CLOCK'
end
local due = redis.call('ZSCORE', KEYS[1], ARGV[1])
if not due or tonumber(due) > now then
  return '0'
end
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('ZADD', KEYS[2], string.format('%.0f', tonumber(due)), ARGV[1])
return '1'
