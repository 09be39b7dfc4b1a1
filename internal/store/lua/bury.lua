-- bury.lua: declares an incarnation dead whose lease has run out. The one moment of death.
--
-- KEYS[1] instances  KEYS[2] dead
-- ARGV[1] incarnation  ARGV[2] where the caller expects this clock (unix ms)  ARGV[3] tolerance (ms)
-- Reply: 'CLOCK', '1' buried by this call, '0' not due or not on the list

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
redis.call('ZADD', KEYS[2], string.format('%.0f', now), ARGV[1])
return '1'
