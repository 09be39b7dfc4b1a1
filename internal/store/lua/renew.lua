-- renew.lua: extends the lease of a live incarnation. It never revives a dead one.
--
-- KEYS[1] live servers  KEYS[2] dead servers  KEYS[3] format, or owned index in the same slot  KEYS[4] name of the incarnation
-- ARGV[1] incarnation  ARGV[2] lease (ms)  ARGV[3] own server channel  ARGV[4] echo  ARGV[5] '1': list the dead servers
-- ARGV[6] version of the layout if KEYS[3] is the format, otherwise ''
-- ARGV[7] name for people, or ''  ARGV[8] life of the name (ms)
-- Reply: {live 0/1, now, next other incarnation or '', its deadline, size of owned or -1, receivers of the echo,
--   dead, end of its lease, ...}

local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)
local function int(n)
  return string.format('%.0f', n)
end
local deadline = now + tonumber(ARGV[2])

-- ZADD also reports no change if the deadline is the same to the millisecond. Only then
-- the list is read.
local present = redis.pcall('ZADD', KEYS[1], 'XX', 'CH', int(deadline), ARGV[1])
if type(present) == 'table' then
  -- Redis may be out of memory. It refuses the first write of a script that may take
  -- more memory, and allows all writes after any other write. Renewals must be
  -- possible.
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
if present == 1 and ARGV[7] ~= '' then
  redis.call('SET', KEYS[4], ARGV[7], 'PX', ARGV[8])
end
local heard = redis.call('PUBLISH', ARGV[3], ARGV[4])
local reply = { present, int(now), other, due, owned, heard }
if ARGV[5] == '1' then
  local dead = redis.call('ZRANGE', KEYS[2], 0, 63, 'WITHSCORES')
  for i = 1, #dead, 2 do
    reply[#reply + 1] = dead[i]
    reply[#reply + 1] = int(tonumber(dead[i + 1]))
  end
end
return reply
