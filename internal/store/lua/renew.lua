-- renew.lua: prolongs the lease of a living incarnation, never revives a dead one.
--
-- KEYS[1] instances  KEYS[2] dead  KEYS[3] format, or owned index in the same slot
-- ARGV[1] incarnation  ARGV[2] lease (ms)  ARGV[3] own control channel  ARGV[4] beat  ARGV[5] '1': list the dead
-- ARGV[6] version of the layout, if KEYS[3] is the format; otherwise ''
-- Reply: {present 0/1, now, next foreign incarnation or '', its deadline, size of owned or -1, who heard the beat, dead ...}

local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)
local function int(n)
  return string.format('%.0f', n)
end
local deadline = now + tonumber(ARGV[2])

-- A deadline that is the same to the millisecond changes nothing and would
-- read as absent, so presence is asked for only then.
local present = redis.pcall('ZADD', KEYS[1], 'XX', 'CH', int(deadline), ARGV[1])
if type(present) == 'table' then
  -- Out of memory, perhaps: Redis refuses the first write of a script that may
  -- take more, and lets it go on after any other. Living must be possible.
  redis.call('ZREM', KEYS[1], '')
  present = redis.call('ZADD', KEYS[1], 'XX', 'CH', int(deadline), ARGV[1])
end
if present == 0 and redis.call('ZSCORE', KEYS[1], ARGV[1]) then
  present = 1
end
local first = redis.call('ZRANGE', KEYS[1], 0, 1, 'WITHSCORES')
local other, due = '', '0'
for i = 1, #first, 2 do
  if first[i] ~= ARGV[1] then
    other, due = first[i], int(tonumber(first[i + 1]))
    break
  end
end
local owned = -1
if ARGV[6] == '' then
  owned = redis.call('SCARD', KEYS[3])
elseif redis.call('EXISTS', KEYS[3]) == 0 then
  redis.call('SET', KEYS[3], ARGV[6]) -- it was lost
end
local heard = redis.call('PUBLISH', ARGV[3], ARGV[4])
local reply = { present, int(now), other, due, owned, heard }
if ARGV[5] == '1' then
  for _, d in ipairs(redis.call('ZRANGE', KEYS[2], 0, 63)) do
    reply[#reply + 1] = d
  end
end
return reply
